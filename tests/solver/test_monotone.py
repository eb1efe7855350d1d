"""More room is never worse. Oracle: the same solver on the tighter problem."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from layercache.errors import BudgetError
from layercache.solver import SOLVERS, ScheduleProblem
from layercache.solver.dp import DynamicProgramme
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
def test_predicting_is_never_worse_than_reuse_without_a_memory_limit(
    problem: ScheduleProblem,
) -> None:
    free = replace(problem, max_cache_bytes=None)
    assert objective(replace(free, history=1)) <= objective(replace(free, history=0))


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
@given(problems(step_unit=True))
def test_a_step_unit_is_never_worse_than_running_every_step(problem: ScheduleProblem) -> None:
    assert problem.step is not None
    if not problem.groups:
        return
    step = problem.units[problem.step]
    without = replace(
        problem,
        units=tuple(problem.units[group] for group in problem.groups),
        fixed_ms=problem.fixed_ms + float(step.compute_ms.sum()),
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
    always = replace(problem, units=rest, fixed_ms=problem.fixed_ms + float(last.compute_ms.sum()))
    assert objective(problem) <= objective(always)


def test_many_budgets_from_one_pass_equal_one_at_a_time() -> None:
    problem = random_problem(3, steps=12, groups=3, step_unit=True, lags=5, spans=5)
    budgets = [share * full_cost(problem) for share in (0.9, 0.6, 0.4)]
    programme = DynamicProgramme(problem)
    together = [programme.solve(budget) for budget in budgets]
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
