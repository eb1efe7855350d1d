"""The published allocator: what it takes first, and what it says when it is stuck."""

from __future__ import annotations

import numpy as np
import pytest

from layercache.errors import BudgetError
from layercache.solver import SOLVERS, ScheduleProblem, UnitCosts
from tests.solver.strategies import random_problem


def row(name: str, prices: list[float], ms: float = 1.0) -> UnitCosts:
    """Reuse of the step before alone, at the given prices."""
    errors = np.array(prices, dtype=float)[:, None, None]
    return UnitCosts(
        name=name,
        kind="group",
        compute_ms=np.full(len(prices), ms),
        residual_bytes=1,
        errors=errors,
    )


def problem(*units: UnitCosts, budget: float) -> ScheduleProblem:
    return ScheduleProblem(units=units, budget_ms=budget)


def test_the_least_price_per_millisecond_goes_first() -> None:
    dear = row("dear", [0, 6, 6, 6], ms=4.0)
    cheap = row("cheap", [0, 9, 2, 9], ms=1.0)
    full = 4 * 5.0
    first = SOLVERS["greedy"](problem(dear, cheap, budget=full - 1))
    # 6 / 4 ms is less than 2 / 1 ms.
    assert first.computed[:, 0].sum() == 3
    assert first.computed[:, 1].all()


def test_it_stops_as_soon_as_the_budget_is_met() -> None:
    solution = SOLVERS["greedy"](problem(row("g", [0, 1, 2, 3, 4]), budget=4.0))
    assert solution.computed[:, 0].tolist() == [True, False, True, True, True]
    assert solution.cost_ms == 4


def test_a_dead_end_is_said_and_dp_finds_a_way() -> None:
    """With lags of one step no neighbours can be cached: taking step 2 first blocks 1 and 3."""
    stuck = problem(row("g", [0, 5, 1, 5]), budget=2.0)
    with pytest.raises(BudgetError) as error:
        SOLVERS["greedy"](stuck)
    assert "3.0 ms" in str(error.value) and "budget_ms=2.0" in str(error.value)
    assert SOLVERS["dp"](stuck).objective == 10


def test_it_skips_whole_steps_where_that_is_cheap() -> None:
    errors = np.full((6, 5, 1), 0.01)
    step = UnitCosts(
        name="step", kind="step", compute_ms=np.ones(6), residual_bytes=1, errors=errors
    )
    group = UnitCosts(
        name="g", kind="group", compute_ms=np.ones(6), residual_bytes=1, errors=errors * 1e3
    )
    solution = SOLVERS["greedy"](ScheduleProblem(units=(step, group), budget_ms=6.0))
    assert solution.computed.sum(axis=0).tolist() == [3, 3]
    assert (solution.computed[:, 0] == solution.computed[:, 1]).all()


@pytest.mark.parametrize("seed", range(8))
def test_its_cost_is_the_one_that_it_counted(seed: int) -> None:
    tight = random_problem(
        seed, steps=8, groups=3, step_unit=bool(seed % 2), share=0.7, lags=6, loads=bool(seed // 4)
    )
    try:
        solution = SOLVERS["greedy"](tight)
    except BudgetError:
        pytest.skip("a dead end")
    spent = tight.fixed_ms + sum(
        float(unit.compute_ms[mask].sum())
        for unit, mask in zip(tight.units, solution.computed.T, strict=True)
    )
    assert solution.cost_ms == spent <= tight.budget_ms
