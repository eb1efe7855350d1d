"""Random schedule problems and synthetic statistics, for hypothesis and for plain tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from layercache.solver import ScheduleProblem, UnitCosts
from layercache.stats import CalibrationStats, Group


def unit(
    rng: np.random.Generator,
    steps: int,
    *,
    name: str = "g",
    kind: Any = "group",
    branch: str = "",
    lags: int = 3,
    spans: int = 3,
    refresh_ms: float | None = None,
    holes: float = 0.0,
) -> UnitCosts:
    """A unit with whole-numbered prices, costs and bytes, so that sums are exact."""
    errors = rng.integers(1, 40, (steps, lags, spans + 1)).astype(float)
    errors[rng.random(errors.shape) < 0.1] = 0.0
    errors[rng.random(errors.shape) < holes] = np.inf
    return UnitCosts(
        name=name,
        kind=kind,
        branch=branch,
        refresh_ms=float(rng.integers(1, 5)) if refresh_ms is None else refresh_ms,
        residual_bytes=int(rng.integers(1, 4)),
        extra_bytes=int(rng.integers(0, 3)) if kind == "step" else 0,
        errors=errors,
    )


def full_cost(problem: ScheduleProblem) -> float:
    return problem.fixed_ms + problem.num_steps * sum(u.refresh_ms for u in problem.units)


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
    branches: tuple[str, ...] = ("",),
    **changes: Any,
) -> ScheduleProblem:
    """A problem whose budget is a share of full compute; each branch has its own units."""
    rng = np.random.default_rng(seed)
    shape = {"lags": lags, "spans": spans, "holes": holes}
    units: list[UnitCosts] = []
    for branch in branches:
        units += [
            unit(rng, steps, name=f"{branch}g{i}", branch=branch, **shape) for i in range(groups)
        ]
        if step_unit:
            row = unit(rng, steps, name=f"{branch}step", kind="step", branch=branch, **shape)
            units.insert(int(rng.integers(0, len(units) + 1)), row)
    arguments: dict[str, Any] = {
        "sigmas": np.linspace(1, 0, steps + 1),
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
    branched: bool = True,
) -> ScheduleProblem:
    """Small problems, corner cases among them: one step, one unit, free units, impossible cells."""
    has_step = draw(st.booleans()) if step_unit is None else step_unit
    has_limit = draw(st.booleans()) if limited is None else limited
    branches = draw(st.sampled_from([("",), ("",), ("a", "b")])) if branched else ("",)
    steps = draw(st.sampled_from([1, 2, 4, 5] if len(branches) == 1 else [1, 3, 4]))
    lags = draw(st.integers(1, 5))
    groups = draw(st.integers(0 if has_step else 1, 2 if len(branches) == 1 else 1))
    problem = random_problem(
        draw(st.integers(0, 10_000)),
        steps=steps,
        groups=groups,
        step_unit=has_step,
        branches=branches,
        share=draw(st.sampled_from([0.3, 0.5, 0.7, 1.0])),
        lags=lags,
        spans=draw(st.integers(0, 4)),
        holes=draw(st.sampled_from([0.0, 0.0, 0.3])),
        history=draw(st.integers(0, 3)),
        max_gap=draw(st.sampled_from([None, None, 0, 1, 2, 99])),
        forced=frozenset(draw(st.sets(st.integers(0, steps - 1), max_size=1))),
        max_cache_bytes=draw(st.integers(0, 12)) if has_limit else None,
    )
    if draw(st.integers(0, 4)) == 0 and problem.groups:
        free = replace(problem.units[0], refresh_ms=0.0)
        problem = replace(problem, units=(free, *problem.units[1:]))
    return problem


def random_stats(
    seed: int = 0,
    *,
    prompts: int = 4,
    steps: int = 12,
    groups: int = 3,
    lags: int = 5,
    size: int = 24,
    noise: float = 0.05,
) -> CalibrationStats:
    """Smooth random trajectories: velocities and residuals are sums of slow waves over sigma."""
    rng = np.random.default_rng(seed)
    x = np.linspace(1, 1 / steps, steps)
    sigmas = np.append(3 * x / (1 + 2 * x), 0.0)
    waves = np.stack([np.sin((k + 1) * 2.1 * sigmas[:-1] + k) / (k + 1) for k in range(4)])

    def curve(*shape: int) -> np.ndarray:
        smooth = np.einsum("...ks,kt->...ts", rng.standard_normal((*shape, 4, size)), waves)
        return smooth + noise * rng.standard_normal(smooth.shape) * np.diff(sigmas).max()

    velocities = curve(prompts)
    residuals = 0.3 * rng.uniform(0.5, 2.0, (1, groups, 1, 1)) * curve(prompts, groups)
    deltas = np.zeros((prompts, steps, groups, lags, size))
    for step in range(steps):
        for lag in range(1, min(lags, step) + 1):
            deltas[:, step, :, lag - 1] = residuals[:, :, step - lag] - residuals[:, :, step]
    times = np.concatenate(
        [rng.uniform(2, 3, (prompts, groups)), np.full((prompts, 1), 0.5), np.ones((prompts, 1))],
        axis=1,
    )
    return CalibrationStats(
        sigmas=sigmas,
        groups=tuple(
            Group(block_list="blocks", start=2 * g, stop=2 * g + 2) for g in range(groups)
        ),
        branches=2,
        velocities=velocities.astype(np.float32),
        deltas=deltas.astype(np.float32),
        times_ms=times,
        image_gain=rng.uniform(0.2, 0.3, prompts),
        amplification=np.exp(rng.uniform(-0.3, 0.7, (prompts, steps))),
        group_bytes=tuple(100 + 10 * g for g in range(groups)),
        velocity_bytes=40,
        output_bytes=80,
        numel=size,
        sketch_seed=0,
        prompt_ids=tuple(f"p{i:02d}" for i in range(prompts)),
        model={
            "class_name": "M",
            "block_lists": {"blocks": 2 * groups},
            "architecture": "a" * 8,
        },
        setting={"num_inference_steps": steps, "scheduler_shift": 3.0, "dtype": "float32"},
    )
