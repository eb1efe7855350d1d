"""Random schedule problems, for hypothesis and for plain tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from layercache.solver import ScheduleProblem, UnitCosts


def unit(
    rng: np.random.Generator,
    steps: int,
    *,
    name: str = "g",
    kind: Any = "group",
    lags: int = 3,
    spans: int = 3,
    loads: bool = False,
    holes: float = 0.0,
) -> UnitCosts:
    """A unit with whole-numbered prices, costs and bytes, so that sums are exact."""
    errors = rng.integers(1, 40, (steps, lags, spans + 1)).astype(float)
    errors[rng.random(errors.shape) < 0.1] = 0.0
    errors[rng.random(errors.shape) < holes] = np.inf
    shares = rng.choice([0.0, 0.5, 1.0, 1.0], steps) if loads else np.ones(steps)
    return UnitCosts(
        name=name,
        kind=kind,
        compute_ms=2.0 * float(rng.integers(1, 5)) * shares,
        residual_bytes=int(rng.integers(1, 4)),
        extra_bytes=int(rng.integers(0, 3)) if kind == "step" else 0,
        errors=errors,
    )


def full_cost(problem: ScheduleProblem) -> float:
    return problem.fixed_ms + sum(float(u.compute_ms.sum()) for u in problem.units)


def random_problem(
    seed: int,
    *,
    steps: int = 5,
    groups: int = 2,
    step_unit: bool = False,
    share: float = 0.6,
    holes: float = 0.0,
    lags: int = 3,
    spans: int = 3,
    loads: bool = False,
    **changes: Any,
) -> ScheduleProblem:
    """A problem whose budget is a share of full compute; with `loads`, steps differ in cost."""
    rng = np.random.default_rng(seed)
    shape: dict[str, Any] = {"lags": lags, "spans": spans, "holes": holes, "loads": loads}
    units = [unit(rng, steps, name=f"g{i}", **shape) for i in range(groups)]
    if step_unit:
        row = unit(rng, steps, name="step", kind="step", **shape)
        units.insert(int(rng.integers(0, len(units) + 1)), row)
    arguments: dict[str, Any] = {
        "units": tuple(units),
        "budget_ms": 0.0,
        "fixed_ms": float(rng.integers(0, 3)),
    }
    problem = ScheduleProblem(**arguments | changes)
    return problem.with_budget(np.floor(share * full_cost(problem)))


@st.composite
def problems(
    draw: st.DrawFn,
    *,
    step_unit: bool | None = False,
    limited: bool | None = False,
) -> ScheduleProblem:
    """Small problems, corner cases among them: one step, one unit, free units, impossible cells."""
    has_step = draw(st.booleans()) if step_unit is None else step_unit
    has_limit = draw(st.booleans()) if limited is None else limited
    steps = draw(st.sampled_from([1, 2, 4, 5]))
    lags = draw(st.integers(1, 5))
    groups = draw(st.integers(0 if has_step else 1, 2))
    problem = random_problem(
        draw(st.integers(0, 10_000)),
        steps=steps,
        groups=groups,
        step_unit=has_step,
        loads=draw(st.booleans()),
        share=draw(st.sampled_from([0.3, 0.5, 0.7, 1.0])),
        lags=lags,
        spans=draw(st.integers(0, 4)),
        holes=draw(st.sampled_from([0.0, 0.0, 0.3])),
        history=draw(st.integers(0, 1)),
        max_gap=draw(st.sampled_from([None, None, 0, 1, 2, 99])),
        forced=frozenset(draw(st.sets(st.integers(0, steps - 1), max_size=1))),
        max_cache_bytes=draw(st.integers(0, 12)) if has_limit else None,
    )
    if draw(st.integers(0, 4)) == 0 and problem.groups:
        free = replace(problem.units[0], compute_ms=np.zeros(steps))
        problem = replace(problem, units=(free, *problem.units[1:]))
    return problem
