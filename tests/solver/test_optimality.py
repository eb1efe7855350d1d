"""dp and milp against brute force over all schedules (`oracle.optimum`), in exact whole numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from layercache.errors import BudgetError
from layercache.solver import SOLVERS, ScheduleProblem, ScheduleSolution
from layercache.solver.front import solve_fronts
from tests.solver import oracle
from tests.solver.strategies import problems, random_problem


def solved(name: str, problem: ScheduleProblem) -> ScheduleSolution | None:
    try:
        return SOLVERS[name](problem)
    except BudgetError:
        return None


def objective(name: str, problem: ScheduleProblem) -> float:
    solution = solved(name, problem)
    return np.inf if solution is None else solution.objective


@settings(max_examples=60)
@given(problems(limited=None))
def test_dp_is_brute_force_without_a_step_unit(problem: ScheduleProblem) -> None:
    solution = solved("dp", problem)
    best = oracle.optimum(problem)
    assert (np.inf if solution is None else solution.objective) == best
    if solution is not None:
        assert solution.status == "optimal"
        assert solution.lower_bound == pytest.approx(best)


@settings(max_examples=40)
@given(problems(step_unit=None, limited=None))
def test_milp_is_brute_force(problem: ScheduleProblem) -> None:
    assert objective("milp", problem) == oracle.optimum(problem)


@settings(max_examples=60)
@given(problems(step_unit=True, limited=None))
def test_dp_is_brute_force_with_few_steps(problem: ScheduleProblem) -> None:
    solution = solved("dp", problem)
    best = oracle.optimum(problem)
    if len(problem.families) == 1:
        assert (np.inf if solution is None else solution.objective) == best
    if solution is not None:
        assert solution.lower_bound <= best * (1 + 1e-9)
        assert solution.objective >= best


@settings(max_examples=60)
@given(problems(step_unit=True, limited=None))
def test_dp_brackets_brute_force_where_it_is_heuristic(problem: ScheduleProblem) -> None:
    with pytest.MonkeyPatch.context() as patch:
        few_steps(patch)
        solution = solved("dp", problem)
    best = oracle.optimum(problem)
    if solution is None:
        # dp then tries few step schedules: it may miss a feasible one, never invent one.
        return
    assert solution.lower_bound <= best * (1 + 1e-9)
    assert solution.objective >= best


def few_steps(patch: pytest.MonkeyPatch) -> None:
    """Let dp treat small problems as it does large ones."""
    patch.setattr("layercache.solver.dp.ALL_STEPS", 0)
    patch.setattr("layercache.solver.steps.ALL_STEPS", 0)
    patch.setattr("layercache.solver.dp._ALL", 0)


def test_dp_with_a_step_unit_is_mostly_optimal_where_it_is_heuristic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few_steps(monkeypatch)
    hits = 0
    for seed in range(16):
        problem = random_problem(seed, step_unit=True, history=seed % 3)
        hits += objective("dp", problem) == oracle.optimum(problem)
    assert hits >= 13


@pytest.mark.parametrize("heuristic", [False, True])
def test_dp_with_a_step_unit_for_each_branch_is_near(
    heuristic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if heuristic:
        few_steps(monkeypatch)
    losses = []
    for seed in range(16):
        problem = random_problem(
            seed, steps=4, groups=1, step_unit=True, branches=("a", "b"), history=seed % 3
        )
        losses.append(objective("dp", problem) / max(oracle.optimum(problem), 1e-9))
    assert sum(loss == 1 for loss in losses) >= (10 if heuristic else 16)
    assert max(losses) < 2


@settings(max_examples=60)
@given(problems(step_unit=True, limited=None))
def test_dp_with_the_step_unit_alone_is_exact(problem: ScheduleProblem) -> None:
    alone = ScheduleProblem(
        sigmas=problem.sigmas,
        units=tuple(u for u in problem.units if u.kind == "step"),
        budget_ms=problem.budget_ms / 2,
        history=problem.history,
        max_gap=problem.max_gap,
        max_cache_bytes=problem.max_cache_bytes,
    )
    solution = solved("dp", alone)
    assert (np.inf if solution is None else solution.objective) == oracle.optimum(alone)
    assert solution is None or solution.status == "optimal"


@settings(max_examples=60)
@given(problems(step_unit=None, limited=None))
def test_greedy_is_never_better_than_the_optimum(problem: ScheduleProblem) -> None:
    assert objective("greedy", problem) >= oracle.optimum(problem)


@settings(max_examples=40)
@given(problems(step_unit=None, limited=None))
def test_solutions_keep_to_every_limit(problem: ScheduleProblem) -> None:
    for name in SOLVERS:
        solution = solved(name, problem)
        if solution is None:
            continue
        assert solution.cost_ms <= problem.budget_limit
        if problem.max_cache_bytes is not None:
            assert solution.cache_bytes <= problem.max_cache_bytes
        for row in solution.units:
            assert row.refresh[0]
        runs = {
            unit.branch: row.refresh
            for row, unit in zip(solution.units, problem.units, strict=True)
            if unit.kind == "step"
        }
        for row, unit in zip(solution.units, problem.units, strict=True):
            assert all(row.refresh[t] for t in problem.forced)
            if unit.kind == "group":
                idle = ~row.refresh & (row.anchor < 0)
                run = runs.get(unit.branch, np.ones(problem.num_steps, dtype=bool))
                assert (idle == ~run).all()


@pytest.mark.parametrize("history", [0, 1, 2, 3])
def test_fronts_are_brute_force_for_every_number_of_refreshes(history: int) -> None:
    for seed in range(6):
        problem = random_problem(seed, steps=7, groups=2, history=history, holes=0.1)
        fronts = solve_fronts(np.stack(problem.prices), history)
        for row, unit in enumerate(problem.units):
            expected = oracle.front(problem, unit)
            for count in range(1, 8):
                assert fronts.values[row, count] == expected.get(count, np.inf)
                if count in expected:
                    assert fronts.refreshes(row, count).sum() == count
