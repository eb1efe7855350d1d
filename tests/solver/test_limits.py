"""Budgets at and below the smallest feasible one, memory limits, scaling and symmetry."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layercache.errors import BudgetError
from layercache.solver import SOLVERS, InfeasibleBudgetError, ScheduleProblem
from tests.solver.strategies import full_cost, problems, random_problem


@settings(max_examples=30)
@given(problems(step_unit=None, limited=None))
def test_the_smallest_feasible_budget_passes_and_just_below_raises(
    problem: ScheduleProblem,
) -> None:
    with pytest.raises(InfeasibleBudgetError) as error:
        SOLVERS["dp"](problem.with_budget(-1.0))
    smallest = error.value.smallest_ms
    if not np.isfinite(smallest):
        assert "no schedule at all is feasible" in str(error.value)
        return
    assert repr(smallest) in str(error.value)
    assert SOLVERS["dp"](problem.with_budget(smallest)).cost_ms == pytest.approx(smallest)
    below = smallest * (1 - 1e-6) - 1e-6
    with pytest.raises(BudgetError, match=re.escape(f"smallest feasible budget is {smallest!r}")):
        SOLVERS["dp"](problem.with_budget(below))


def test_a_smallest_budget_that_is_not_proven_is_not_called_so() -> None:
    problem = random_problem(0, steps=12, groups=2, step_unit=True)
    with pytest.raises(InfeasibleBudgetError, match="the smallest budget found to be feasible is"):
        SOLVERS["dp"](problem.with_budget(1.0))


@settings(max_examples=20)
@given(problems(step_unit=None, limited=None))
def test_dp_and_milp_agree_on_the_smallest_feasible_budget(problem: ScheduleProblem) -> None:
    numbers = []
    for name in ("dp", "milp"):
        with pytest.raises(InfeasibleBudgetError) as error:
            SOLVERS[name](problem.with_budget(-1.0))
        numbers.append(error.value.smallest_ms)
    assert numbers[0] == pytest.approx(numbers[1])


@pytest.mark.parametrize("name", sorted(SOLVERS))
@settings(max_examples=15)
@given(problem=problems(step_unit=None, limited=None))
def test_full_compute_costs_nothing_in_quality(name: str, problem: ScheduleProblem) -> None:
    solution = SOLVERS[name](problem.with_budget(full_cost(problem)))
    assert solution.objective == 0
    if name == "greedy":
        # Only greedy stops at once; the others may cache what is free.
        assert solution.computed.all()


@settings(max_examples=25)
@given(problems(step_unit=None, limited=None), st.sampled_from([0.25, 8.0]))
def test_scaling_all_prices_scales_the_objective(problem: ScheduleProblem, factor: float) -> None:
    scaled = replace(
        problem,
        units=tuple(replace(unit, errors=unit.errors * factor) for unit in problem.units),
    )
    for name in ("greedy", "dp"):
        try:
            solution = SOLVERS[name](problem)
        except BudgetError:
            continue
        assert SOLVERS[name](scaled).objective == solution.objective * factor


@settings(max_examples=25)
@given(problems(step_unit=None, limited=None), st.randoms(use_true_random=False))
def test_permuting_units_permutes_the_schedule(problem: ScheduleProblem, random) -> None:  # type: ignore[no-untyped-def]
    order = list(range(len(problem.units)))
    random.shuffle(order)
    permuted = replace(problem, units=tuple(problem.units[i] for i in order))
    try:
        solution = SOLVERS["dp"](problem)
    except BudgetError:
        return
    other = SOLVERS["dp"](permuted)
    assert other.objective == solution.objective
    assert list(other.names) == [problem.units[i].name for i in order]


def test_a_memory_limit_of_zero_leaves_full_compute() -> None:
    problem = random_problem(6, share=1.0, max_cache_bytes=0)
    # Free cells may not be cached either: a stored residual takes bytes.
    assume_bytes = all(unit.residual_bytes > 0 for unit in problem.units)
    assert assume_bytes
    for name in SOLVERS:
        solution = SOLVERS[name](problem)
        assert solution.cache_bytes == 0
        assert solution.computed.all()
    with pytest.raises(BudgetError, match="within max_cache_bytes=0: the smallest feasible"):
        SOLVERS["dp"](problem.with_budget(problem.budget_ms * 0.9))
