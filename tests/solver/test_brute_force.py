"""dp against brute force on tiny instances.

Oracle: `cheapest` tries every combination of refreshed cells of all units, prices each by the
definition in `solver/problem.py` written out plainly, and shares no code with the solvers.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layercache.errors import BudgetError
from layercache.solver import SOLVERS, ScheduleProblem, UnitCosts


@st.composite
def problems(draw: st.DrawFn, with_step: bool) -> ScheduleProblem:
    """Tiny problems with integer prices and costs, so that totals are exact."""
    steps = draw(st.integers(1, 5 if with_step else 6))
    groups = draw(st.integers(0 if with_step else 1, 2))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    units = []
    for index in range(groups + with_step):
        kind = "step" if with_step and index == 0 else "group"
        shape = (steps, int(rng.integers(1, 5)), int(rng.integers(1, 4)))
        errors = rng.integers(0, 20, shape).astype(float)
        errors[rng.random(shape) < 0.1] = np.inf
        units.append(
            UnitCosts(
                name="step" if kind == "step" else f"g{index}",
                kind=kind,
                refresh_ms=float(rng.integers(0, 4)),
                residual_bytes=int(rng.integers(0, 5)),
                errors=errors,
            )
        )
    full = steps * sum(unit.refresh_ms for unit in units)
    return ScheduleProblem(
        sigmas=np.linspace(1, 0, steps + 1),
        units=tuple(units),
        budget_ms=float(draw(st.integers(0, int(full)))),
        history=draw(st.integers(0, 2)),
        max_gap=draw(st.one_of(st.none(), st.integers(0, 3))),
    )


def price(problem: ScheduleProblem, unit: UnitCosts, refreshes: list[int], step: int) -> float:
    """The cheapest way to cache one cell, straight from the definition."""
    earlier = [s for s in refreshes if s < step]
    anchor = earlier[-1]
    lag = step - anchor
    if lag > unit.errors.shape[1] or (problem.max_gap is not None and lag > problem.max_gap):
        return float("inf")
    options = [float(unit.errors[step, lag - 1, 0])]
    bases = earlier[:-1][-problem.history :] if problem.history else []
    for base in bases:
        if anchor - base < unit.errors.shape[2]:
            options.append(float(unit.errors[step, lag - 1, anchor - base]))
    return min(options)


def cheapest(problem: ScheduleProblem) -> float:
    """The least objective within the budget, infinite if there is none."""
    steps = range(problem.num_steps)
    rows = [
        [0, *chosen]
        for count in range(problem.num_steps)
        for chosen in itertools.combinations(steps[1:], count)
    ]
    best = float("inf")
    for choice in itertools.product(rows, repeat=len(problem.units)):
        refreshed: list[Any] = list(choice)
        run = set(steps)
        if problem.units[0].kind == "step":
            run = set(refreshed[0])
        if any(not set(row) <= run for row in refreshed):
            continue
        cost = sum(
            len(row) * unit.refresh_ms for row, unit in zip(refreshed, problem.units, strict=True)
        )
        if cost > problem.budget_ms:
            continue
        total = 0.0
        for row, unit in zip(refreshed, problem.units, strict=True):
            active = steps if unit.kind == "step" else sorted(run)
            total += sum(price(problem, unit, row, t) for t in active if t not in row)
        best = min(best, total)
    return best


@settings(max_examples=120, deadline=None)
@given(problem=problems(with_step=False))
def test_dp_finds_the_optimum_over_groups(problem: ScheduleProblem) -> None:
    best = cheapest(problem)
    if best == float("inf"):
        with pytest.raises(BudgetError):
            SOLVERS["dp"](problem)
        return
    solution = SOLVERS["dp"](problem)
    assert solution.objective == best
    assert solution.lower_bound == best
    assert solution.cost_ms <= problem.budget_ms


@settings(max_examples=80, deadline=None)
@given(problem=problems(with_step=True))
def test_dp_with_a_step_unit_is_bracketed_by_its_bound(problem: ScheduleProblem) -> None:
    """Joint choice is heuristic: never better than the optimum, its bound never above it."""
    best = cheapest(problem)
    try:
        solution = SOLVERS["dp"](problem)
    except BudgetError:
        # The step schedules that dp tries may miss the only feasible one; never the reverse.
        return
    assert solution.lower_bound <= best <= solution.objective
    assert solution.cost_ms <= problem.budget_ms
    if len(problem.units) == 1:
        assert solution.objective == best


@settings(max_examples=120, deadline=None)
@given(problem=problems(with_step=False))
def test_greedy_is_feasible_and_never_better_than_dp(problem: ScheduleProblem) -> None:
    try:
        greedy = SOLVERS["greedy"](problem)
    except BudgetError:
        return
    assert greedy.cost_ms <= problem.budget_ms
    assert greedy.objective >= SOLVERS["dp"](problem).objective
