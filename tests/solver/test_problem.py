"""What a problem refuses, in full text, and what it derives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from layercache.solver import SOLVERS, ProblemError, ScheduleProblem, UnitCosts

SIGMAS = np.array([1.0, 0.7, 0.4, 0.0])


def costs(**changes: Any) -> UnitCosts:
    arguments: dict[str, Any] = {
        "name": "g",
        "kind": "group",
        "refresh_ms": 1.0,
        "residual_bytes": 8,
        "errors": np.ones((3, 2, 2)),
    }
    return UnitCosts(**arguments | changes)


def problem(**changes: Any) -> ScheduleProblem:
    arguments: dict[str, Any] = {"sigmas": SIGMAS, "units": (costs(),), "budget_ms": 2.0}
    return ScheduleProblem(**arguments | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"errors": np.ones((3, 2))},
            "g: errors has shape (3, 2); it must be (T, L, J+1), all >= 1",
        ),
        ({"errors": np.full((3, 2, 2), np.nan)}, "g: errors holds NaN or negative prices"),
        ({"errors": -np.ones((3, 2, 2))}, "g: errors holds NaN or negative prices"),
        ({"kind": "block"}, "g: kind is 'block'; use 'group' or 'step'"),
        ({"refresh_ms": -1.0}, "g: refresh_ms is -1.0; it must be finite and >= 0"),
        (
            {"residual_bytes": -1},
            "g: residual_bytes=-1, extra_bytes=0; neither may be negative",
        ),
    ],
)
def test_malformed_units_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ProblemError) as error:
        costs(**changes)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sigmas": np.array([1.0, 0.7, 0.7, 0.0])},
            "sigmas must fall strictly; sigmas[1] is 0.7 and sigmas[2] is 0.7",
        ),
        ({"sigmas": np.array([1.0])}, "sigmas has shape (1,); it needs T+1 >= 2 finite values"),
        ({"units": ()}, "a problem needs at least one unit"),
        (
            {"sigmas": np.array([1.0, 0.5, 0.0])},
            "g: errors covers 3 steps, sigmas 2",
        ),
        ({"units": (costs(), costs())}, "unit names repeat: ['g', 'g']"),
        (
            {"units": (costs(kind="step"), costs(name="h", kind="step"))},
            "step units serve the branches ['', '']; there may be one for all branches (''), "
            "or one for each",
        ),
        (
            {"units": (costs(kind="step", branch="cond"), costs(name="h"))},
            "step units serve the branches ['cond'], and group 'h' all of them: give every group "
            "the branch that it serves",
        ),
        ({"power": np.inf}, "power is inf; it must be finite and above 0"),
        ({"history": 4}, "history is 4; 0 to 3 refreshes can be kept"),
        ({"max_gap": -1}, "max_gap is -1; it must be at least 0"),
        ({"forced": frozenset({3})}, "forced is [3]; steps are 0 to 2"),
        ({"power": 0.0}, "power is 0.0; it must be finite and above 0"),
        ({"max_cache_bytes": -1}, "max_cache_bytes is -1; it must be at least 0"),
    ],
)
def test_malformed_problems_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ProblemError) as error:
        problem(**changes)
    assert str(error.value) == message


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
    single = problem(
        sigmas=np.array([1.0, 0.0]), units=(costs(errors=np.ones((1, 1, 1))),), budget_ms=1.0
    )
    solution = SOLVERS[name](single)
    assert solution.units[0].refresh.tolist() == [True]
    assert solution.objective == 0


@pytest.mark.parametrize("name", ["dp", "milp"])
def test_units_without_cost_are_always_computed(name: str) -> None:
    free = costs(name="free", refresh_ms=0.0)
    solution = SOLVERS[name](problem(units=(free, costs()), budget_ms=2.0))
    assert solution.units[0].refresh.all()
    assert solution.objective == 1


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_forced_steps_are_computed(name: str) -> None:
    solution = SOLVERS[name](problem(forced=frozenset({2}), budget_ms=2.0))
    assert solution.units[0].refresh.tolist() == [True, False, True]


def test_solutions_print_a_grid() -> None:
    text = str(SOLVERS["dp"](problem(forced=frozenset({2}), budget_ms=2.0)))
    assert text == ("dp: objective 1, lower bound 1 (optimal), 2 ms, 8 bytes\n  g  #-#")
