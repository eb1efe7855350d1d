"""Closed-loop refinement of a plan's gains. Oracle of the cells: the loop's own mean velocities."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from layercache import (
    CalibrationStats,
    LayerCacheError,
    ModelMismatchError,
    Plan,
    StatsError,
    compile_plan,
)
from layercache.calibration import calibrate
from layercache.refine import _ClosedLoop, refine_plan
from tests.tiny import tiny_arguments, tiny_pipeline

PROMPTS = ["a large red ring", "a small blue square", "a green circle"]
STEPS = 10


@pytest.fixture(scope="module")
def stats() -> CalibrationStats:
    found = calibrate(
        tiny_pipeline(),
        PROMPTS,
        num_inference_steps=STEPS,
        groups=2,
        lags=4,
        batch_size=3,
        call_kwargs=tiny_arguments(),
        progress=False,
    )
    # Measured times of a busy machine could make another kind of plan.
    return replace(found, times_ms=np.tile([1.0, 1.0, 0.2, 0.1], (len(PROMPTS), 1)))


def refine(stats: CalibrationStats, plan: Plan, **changes: Any) -> Plan:
    arguments: dict[str, Any] = {"prompts": PROMPTS, "call_kwargs": tiny_arguments()} | changes
    return refine_plan(tiny_pipeline(), plan, stats, **arguments)


@pytest.mark.parametrize("share", [0.4, 0.6])
@pytest.mark.parametrize("units", [("step",), ("step", "groups")])
def test_a_refined_plan_keeps_its_schedule_and_is_no_worse(
    stats: CalibrationStats, share: float, units: tuple[str, ...]
) -> None:
    plan = compile_plan(stats, share, units=units)
    refined = refine(stats, plan)
    assert refined.run_steps == plan.run_steps
    assert refined.groups == plan.groups
    assert refined.predicted.compute_share == pytest.approx(plan.predicted.compute_share)
    note = refined.provenance["refined"]
    assert note["prompts"] == 3
    assert note["kept"] == (note["psnr_db_after"] > note["psnr_db_before"])
    assert (refined.units != plan.units) == note["kept"]
    assert Plan.from_dict(refined.to_dict()) == refined


@pytest.fixture
def always_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every refinement seems to help; on a random model many do not."""
    values = itertools.count(1.0)
    monkeypatch.setattr("layercache.refine._psnr", lambda *_: next(values))


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("share", [0.35, 0.5, 0.8])
@pytest.mark.parametrize("gains", ["trajectory", "multistep"])
def test_the_taps_give_the_mean_velocities_of_the_loop(
    stats: CalibrationStats, depth: int, share: float, gains: str
) -> None:
    plan = compile_plan(stats, share, units=("step",), gains=gains)
    unit = plan.step_unit
    assert unit is not None
    rng = np.random.default_rng(0)
    velocities = torch.tensor(rng.standard_normal((STEPS, 3, 8)))
    truth = {step: rng.standard_normal((3, 8)) for step in range(STEPS + 1)}
    loop = _ClosedLoop(plan, unit, depth, truth)
    sample, used = torch.zeros(3, 8, dtype=torch.float64), []
    for step in range(STEPS):
        used.append(loop.on_step(step, velocities[step], sample))
        sample = sample + (plan.sigmas[step + 1] - plan.sigmas[step]) * used[-1]
    row = loop.row()
    assert row.taps is not None and max(map(len, row.taps)) <= depth
    computed: list[int] = []
    for step, symbol in enumerate(row.cells):
        if symbol == "#":
            wanted = velocities[step].clone()
            for tap, earlier in zip(row.taps[step], reversed(computed), strict=False):
                wanted += tap * (velocities[step] - velocities[earlier])
            computed.append(step)
        torch.testing.assert_close(used[step], wanted)


def test_a_fit_without_error_brings_the_run_back_to_the_uncached_one(
    stats: CalibrationStats,
) -> None:
    """If the truth can be reached with the velocities at hand, the loop finds out how."""
    plan = compile_plan(stats, 0.5, units=("step",))
    unit = plan.step_unit
    assert unit is not None
    rng = np.random.default_rng(1)
    start, slope = rng.standard_normal((2, 3, 50))
    velocity = {s: start + plan.sigmas[s] * slope for s in range(STEPS)}
    truth = {0: np.zeros((3, 50))}
    for s in range(STEPS):
        truth[s + 1] = truth[s] + (plan.sigmas[s + 1] - plan.sigmas[s]) * velocity[s]
    loop = _ClosedLoop(plan, unit, 4, truth)
    sample = torch.zeros(3, 50, dtype=torch.float64)
    for s in range(STEPS):
        used = loop.on_step(s, torch.tensor(velocity[s]), sample)
        sample = sample + (plan.sigmas[s + 1] - plan.sigmas[s]) * used
    np.testing.assert_allclose(sample.numpy(), truth[STEPS], atol=1e-3)


def test_what_runs_before_the_first_skipped_step_is_untouched(
    stats: CalibrationStats, always_kept: None
) -> None:
    refined = refine(stats, compile_plan(stats, 0.6, units=("step",), forced=(1, 2, 3)))
    unit = refined.step_unit
    assert unit is not None and unit.taps is not None
    assert unit.cells.startswith("####")
    assert not any(unit.taps[:3]) and any(unit.taps)


def test_a_fit_that_does_harm_is_not_kept(
    stats: CalibrationStats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layercache.refine.fit_row", lambda basis, target, prior: prior + 3.0)
    plan = compile_plan(stats, 0.5, units=("step",))
    lines: list[str] = []
    refined = refine(stats, plan, log=lines.append)
    assert refined.units == plan.units
    assert refined.provenance["refined"]["kept"] is False
    assert lines[0].endswith("the compiled plan is kept")


def test_figures_are_those_of_the_new_rows(stats: CalibrationStats, always_kept: None) -> None:
    plan = compile_plan(stats, 0.4, units=("step",))
    refined = refine(stats, plan)
    assert refined.provenance["refined"]["kept"]
    assert refined.certificate.objective >= plan.certificate.lower_bound
    assert refined.predicted.psnr_db != plan.predicted.psnr_db
    held = refined.cache_bytes({}, stats.velocity_bytes, stats.output_bytes)
    assert refined.predicted.cache_bytes == held


@pytest.mark.parametrize("options", [{"units": ("groups",)}, {"gains": "none"}])
def test_a_plan_without_predicted_steps_is_refused(
    stats: CalibrationStats, options: dict[str, Any]
) -> None:
    plan = compile_plan(stats, 0.7, **options)
    with pytest.raises(LayerCacheError, match="this plan has nothing to refine: it needs"):
        refine(stats, plan)


@pytest.mark.parametrize("prompts", [PROMPTS[:1], [{"prompt": p} for p in PROMPTS]])
def test_prompts_must_make_one_call(stats: CalibrationStats, prompts: list[Any]) -> None:
    plan = compile_plan(stats, 0.5, units=("step",))
    with pytest.raises(StatsError, match=r"prompts make \d pipeline calls; refining needs two"):
        refine(stats, plan, prompts=prompts)


def test_another_number_of_steps_is_refused(stats: CalibrationStats) -> None:
    plan = compile_plan(stats, 0.5, units=("step",))
    arguments = tiny_arguments() | {"sigmas": np.linspace(1, 1 / 14, 14).tolist()}
    with pytest.raises(ModelMismatchError, match="the pipeline takes 14 steps and the plan has 10"):
        refine(stats, plan, call_kwargs=arguments)


def test_a_memory_limit_of_the_plan_is_kept(stats: CalibrationStats, always_kept: None) -> None:
    plan = compile_plan(stats, 0.5, units=("step",), gains="trajectory", history=1)
    limit = plan.predicted.cache_bytes
    # The same plan, which may now use more earlier outputs than it has the memory for.
    asked = plan.provenance | {"max_cache_bytes": limit}
    limited = plan.model_copy(update={"provenance": asked})
    assert refine(stats, limited).predicted.cache_bytes <= limit
    assert refine(stats, plan).predicted.cache_bytes > limit
