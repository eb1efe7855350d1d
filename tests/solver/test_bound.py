"""The decomposition bound and the milp's statuses."""

from __future__ import annotations

import numpy as np
import pytest

from layercache.solver import SOLVERS, InfeasibleBudgetError, dp, milp
from layercache.solver.bound import Paths, joint_bound
from tests.solver import oracle
from tests.solver.strategies import full_cost, random_problem


@pytest.mark.parametrize("history", [0, 1, 2])
def test_paths_without_idle_cells_are_lagrangian_fronts(history: int) -> None:
    """Oracle: the front, priced per refresh. With a history of 2 paths may only be lower."""
    problem = random_problem(history, steps=9, groups=3, history=history, lags=4, spans=4)
    tables = np.stack(problem.prices)
    front = dp.solve_fronts(tables, history).values
    counts = np.arange(front.shape[1])
    for price in (0.5, 3.0, 9.0):
        expected = (front + price * counts).min(axis=1)
        paths = Paths(tables, 5, history)
        total, refreshed, idle = paths.solve(np.full(3, price))
        if history < 2:
            assert total == pytest.approx(expected)
        else:
            assert (total <= expected + 1e-9).all()
        assert refreshed[:, 0].all()
        assert not idle.any()


@pytest.mark.parametrize("seed", range(10))
def test_the_joint_bound_is_below_brute_force_whatever_is_known(seed: int) -> None:
    problem = random_problem(seed, step_unit=True, history=seed % 3, share=0.5)
    best = oracle.optimum(problem)
    tables = [np.stack([problem.prices[g] for g in f.groups]) for f in problem.families]
    for known in (best, 3 * best + 1):
        assert joint_bound(problem, tables, problem.budget_ms, known) <= best + 1e-6


def test_the_joint_bound_is_worth_having() -> None:
    shares = []
    for seed in range(8):
        problem = random_problem(seed, step_unit=True, share=0.6)
        best = oracle.optimum(problem)
        if best > 0:
            shares.append(SOLVERS["dp"](problem).lower_bound / best)
    assert len(shares) >= 5
    assert np.median(shares) > 0.5


def test_milp_without_time_says_so() -> None:
    problem = random_problem(2, steps=14, groups=6, lags=8, spans=8, share=0.5)
    with pytest.raises(milp.SolverTimeout, match=r"found no schedule within 0 s"):
        milp.solve(problem, time_limit_s=0.0)


def test_milp_without_time_for_the_smallest_budget_names_one_that_was_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Full compute is feasible, so that "no schedule at all" would be false."""
    problem = random_problem(0, steps=8, groups=3).with_budget(1.0)
    with pytest.raises(InfeasibleBudgetError, match="the smallest feasible budget is") as proven:
        milp.solve(problem)
    runs, run = iter([60.0, 0.0]), milp._run
    monkeypatch.setattr(milp, "_run", lambda model, _: run(model, next(runs)))
    with pytest.raises(InfeasibleBudgetError, match="smallest budget found to be") as found:
        milp.solve(problem)
    assert found.value.smallest_ms >= proven.value.smallest_ms
    assert proven.value.proven and not found.value.proven


def test_milp_proves_what_it_calls_optimal() -> None:
    problem = random_problem(3, steps=8, groups=3, share=0.5)
    solution = milp.solve(problem)
    assert solution.status == "optimal"
    assert solution.gap <= 1e-6
    assert solution.cost_ms <= 0.5 * full_cost(problem)
