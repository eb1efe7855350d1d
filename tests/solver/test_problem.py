"""What a problem refuses, in full text, and what it derives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from layercache.solver import SOLVERS, ProblemError, ScheduleProblem, UnitCosts


def costs(**changes: Any) -> UnitCosts:
    arguments: dict[str, Any] = {
        "name": "g",
        "kind": "group",
        "compute_ms": np.ones(3),
        "residual_bytes": 8,
        "errors": np.ones((3, 2, 2)),
    }
    return UnitCosts(**arguments | changes)


def problem(**changes: Any) -> ScheduleProblem:
    arguments: dict[str, Any] = {"units": (costs(),), "budget_ms": 2.0}
    return ScheduleProblem(**arguments | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"errors": np.ones((3, 2))}, r"g: errors .*\(3, 2\)"),
        ({"errors": np.full((3, 2, 2), np.nan)}, "g: errors holds NaN"),
        ({"errors": -np.ones((3, 2, 2))}, "g: errors .* negative"),
        ({"kind": "block"}, "g: kind is 'block'"),
        ({"compute_ms": -np.ones(3)}, "g: compute_ms is .*-1"),
        ({"compute_ms": np.ones(4)}, r"g: compute_ms has shape \(4,\) for 3"),
        ({"residual_bytes": -1}, "g: residual_bytes=-1"),
    ],
)
def test_malformed_units_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        costs(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"units": ()}, "at least one unit"),
        (
            {"units": (costs(), costs(name="h", errors=np.ones((2, 1, 1)), compute_ms=np.ones(2)))},
            "h.*2 steps",
        ),
        ({"units": (costs(), costs())}, "'g', 'g'"),
        ({"units": (costs(kind="step"), costs(name="h", kind="step"))}, "more than one step unit"),
        ({"history": 2}, "history is 2"),
        ({"max_gap": -1}, "max_gap is -1"),
        ({"forced": frozenset({3})}, r"forced is \[3\]"),
        ({"max_cache_bytes": -1}, "max_cache_bytes is -1"),
        ({"budget_ms": np.inf}, "budget_ms=inf"),
        ({"fixed_ms": -1.0}, "fixed_ms=-1"),
    ],
)
def test_malformed_problems_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        problem(**changes)


def test_cells_before_the_first_step_are_impossible() -> None:
    errors = costs().errors
    assert np.isinf(errors[0]).all()
    assert errors[1, 0, 0] == 1
    assert np.isinf(errors[1, 0, 1])
    assert np.isinf(errors[1, 1, 0])


def test_tables_cannot_be_changed_from_outside() -> None:
    mine = np.ones((3, 2, 2))
    unit = costs(errors=mine)
    mine[2, 0, 0] = 7
    assert unit.errors[2, 0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        unit.errors[2, 0, 0] = 7


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_one_step_is_computed(name: str) -> None:
    unit = costs(errors=np.ones((1, 1, 1)), compute_ms=np.ones(1))
    single = problem(units=(unit,), budget_ms=1.0)
    solution = SOLVERS[name](single)
    assert solution.computed.tolist() == [[True]]
    assert solution.objective == 0


@pytest.mark.parametrize("name", ["dp", "milp"])
def test_units_without_cost_are_always_computed(name: str) -> None:
    free = costs(name="free", compute_ms=np.zeros(3))
    solution = SOLVERS[name](problem(units=(free, costs()), budget_ms=2.0))
    assert solution.computed[:, 0].all()
    assert solution.objective == 1


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_forced_steps_are_computed(name: str) -> None:
    solution = SOLVERS[name](problem(forced=frozenset({2}), budget_ms=2.0))
    assert solution.computed[:, 0].tolist() == [True, False, True]


def test_solutions_print_a_grid() -> None:
    text = str(SOLVERS["dp"](problem(forced=frozenset({2}), budget_ms=2.0)))
    assert text == ("dp: objective 1, lower bound 1 (optimal), 2 ms, 16 bytes\n  g  #-#")
