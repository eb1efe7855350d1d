"""dp and milp against brute force over all schedules (`oracle.optimum`), in exact whole numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from layercache.errors import BudgetError
from layercache.solver import SOLVERS, ScheduleProblem, ScheduleSolution
from layercache.solver._front import solve_fronts, weigh
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


@settings(max_examples=80)
@given(problems(step_unit=None, limited=None))
def test_dp_is_brute_force(problem: ScheduleProblem) -> None:
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


@settings(max_examples=40)
@given(problems(step_unit=True, limited=None))
def test_dp_is_never_better_than_brute_force_where_it_is_heuristic(
    problem: ScheduleProblem,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layercache.solver.dp.ALL_STEPS", 0)
        solution = solved("dp", problem)
    if solution is None:
        # dp then tries few step schedules: it may miss a feasible one, never invent one.
        return
    assert solution.objective >= oracle.optimum(problem)
    if problem.groups:
        assert solution.lower_bound is None


@settings(max_examples=40)
@given(problems(step_unit=True, limited=None))
def test_dp_with_the_step_unit_alone_is_exact(problem: ScheduleProblem) -> None:
    alone = ScheduleProblem(
        units=tuple(u for u in problem.units if u.kind == "step"),
        budget_ms=problem.budget_ms / 2,
        history=problem.history,
        max_gap=problem.max_gap,
        max_cache_bytes=problem.max_cache_bytes,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layercache.solver.dp.ALL_STEPS", 0)
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
        assert solution.computed[0].all()
        assert all(solution.computed[t].all() for t in problem.forced)
        if problem.step is not None:
            run = solution.computed[:, problem.step]
            assert not solution.computed[~run].any()


@pytest.mark.parametrize("loads", [False, True])
@pytest.mark.parametrize("history", [0, 1])
def test_fronts_are_brute_force_for_every_cost(history: int, loads: bool) -> None:
    for seed in range(6):
        problem = random_problem(seed, steps=7, groups=2, history=history, holes=0.1, loads=loads)
        for prices, unit in zip(problem.prices, problem.units, strict=True):
            weights = weigh(unit.compute_ms)
            assert weights.exact
            front = solve_fronts(prices[None], weights.parts)
            expected = oracle.front(problem, unit)
            for weight in range(front.values.shape[1]):
                cost = weight * weights.part_ms
                assert front.values[0, weight] == expected.get(cost, np.inf)
                if cost in expected:
                    mask = front.computed(0, weight)
                    assert unit.compute_ms[mask].sum() == cost


def test_milliseconds_that_are_no_multiples_are_rounded_up_and_nothing_is_proven() -> None:
    problem = random_problem(0, steps=6, groups=1)
    times = np.array([1.0, 0.37, 1.0, 0.71, 1.0, 0.123])
    weights = weigh(times)
    assert not weights.exact
    assert (weights.parts * weights.part_ms >= times - 1e-12).all()
    unit = problem.units[0]
    uneven = ScheduleProblem(
        units=(type(unit)(**vars(unit) | {"compute_ms": times}),), budget_ms=3.0
    )
    solution = SOLVERS["dp"](uneven)
    assert solution.lower_bound is None and solution.cost_ms <= 3.0
    assert solution.objective >= oracle.optimum(uneven)
