"""More room is never worse. Oracle: the same solver on the tighter problem."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from layercache.errors import BudgetError
from layercache.solver import SOLVERS, ScheduleProblem
from layercache.solver.dp import DynamicProgramme, solve_many
from tests.solver.strategies import full_cost, problems, random_problem


def objective(problem: ScheduleProblem) -> float:
    try:
        return SOLVERS["dp"](problem).objective
    except BudgetError:
        return np.inf


@settings(max_examples=30)
@given(problems(step_unit=None, limited=None), st.floats(0, 3))
def test_a_larger_budget_is_never_worse(problem: ScheduleProblem, more: float) -> None:
    assert objective(problem.with_budget(problem.budget_ms + more)) <= objective(problem)


@settings(max_examples=30)
@given(problems(limited=None))
def test_a_deeper_history_is_never_worse(problem: ScheduleProblem) -> None:
    deeper = replace(problem, history=min(problem.history + 1, 3))
    assert objective(deeper) <= objective(problem)


@settings(max_examples=30)
@given(problems(limited=None), st.integers(0, 3))
def test_a_longer_gap_is_never_worse(problem: ScheduleProblem, gap: int) -> None:
    tight, loose = replace(problem, max_gap=gap), replace(problem, max_gap=gap + 1)
    assert objective(loose) <= objective(tight)
    assert objective(replace(problem, max_gap=None)) <= objective(loose)


@settings(max_examples=30)
@given(problems(step_unit=None, limited=True), st.integers(0, 4))
def test_a_larger_memory_limit_is_never_worse(problem: ScheduleProblem, more: int) -> None:
    limit = problem.max_cache_bytes or 0
    assert objective(replace(problem, max_cache_bytes=limit + more)) <= objective(problem)
    assert objective(replace(problem, max_cache_bytes=None)) <= objective(problem)


@settings(max_examples=30)
@given(problems(step_unit=True, branched=False))
def test_a_step_unit_is_never_worse_than_running_every_step(problem: ScheduleProblem) -> None:
    step = problem.step_unit
    assert step is not None
    if not problem.groups:
        return
    without = replace(
        problem,
        units=problem.groups,
        fixed_ms=problem.fixed_ms + problem.num_steps * step.refresh_ms,
    )
    assert objective(problem) <= objective(without)


@settings(max_examples=30)
@given(problems())
def test_a_unit_that_may_be_cached_is_never_worse_than_one_that_may_not(
    problem: ScheduleProblem,
) -> None:
    last = problem.units[-1]
    rest = problem.units[:-1]
    if not rest:
        return
    always = replace(
        problem, units=rest, fixed_ms=problem.fixed_ms + problem.num_steps * last.refresh_ms
    )
    assert objective(problem) <= objective(always)


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.integers(0, 2))
def test_cells_of_their_own_for_each_branch_are_never_worse(seed: int, history: int) -> None:
    """Oracle: one schedule for both branches, whose prices, times and bytes are their sums."""
    problem = random_problem(seed, steps=6, branches=("a", "b"), history=history)
    shared = tuple(
        replace(
            one,
            name=f"both{one.name}",
            branch="",
            errors=one.errors + other.errors,
            refresh_ms=one.refresh_ms + other.refresh_ms,
        )
        for one, other in zip(problem.units[:2], problem.units[2:], strict=True)
    )
    assert objective(problem) <= objective(replace(problem, units=shared))


def test_many_budgets_from_one_pass_equal_one_at_a_time() -> None:
    problem = random_problem(3, steps=12, groups=3, step_unit=True, lags=5, spans=5)
    budgets = [share * full_cost(problem) for share in (0.9, 0.6, 0.4)]
    together = solve_many(problem, budgets)
    for budget, solution in zip(budgets, together, strict=True):
        alone = SOLVERS["dp"](problem.with_budget(budget))
        assert solution.objective == alone.objective
        assert solution.cost_ms == alone.cost_ms <= budget


def test_candidates_are_sorted_and_share_one_bound() -> None:
    problem = random_problem(4, steps=10, groups=2, step_unit=True, lags=4)
    found = DynamicProgramme(problem).candidates(problem.budget_ms)
    objectives = [solution.objective for solution in found]
    assert objectives == sorted(objectives)
    assert len({solution.lower_bound for solution in found}) == 1
    assert found[0].objective == SOLVERS["dp"](problem).objective
