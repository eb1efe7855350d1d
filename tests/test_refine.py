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
from layercache.costs import peak_bytes
from layercache.refine import ClosedLoop, Truth, refine_plan
from layercache.runtime import StepExecutor
from layercache.verify import verify
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


def run_alone(loop: ClosedLoop, velocities: Any, sigmas: Any) -> tuple[list[Any], Any]:
    """Means and the last latent of a loop that runs without a pipeline."""
    sample, means = torch.zeros(3, len(velocities[0][0]), dtype=torch.float64), []
    for step in loop.visited:
        loop.sample = sample
        means.append(loop.compute(step, velocities[step]))
        stop = loop.after(step)
        sample = loop.move(sample, means[-1], step, stop)
        loop.finish(stop - 1)
    return means, sample


def truth_of(latents: Any, plan: Plan) -> Truth:
    return Truth(dict(enumerate(latents)), np.diff(plan.sigmas))


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("share", [0.35, 0.5, 0.8])
@pytest.mark.parametrize("units", [("step",), ("step", "groups"), ("groups",)])
def test_the_taps_give_the_mean_velocities_of_the_loop(
    stats: CalibrationStats, depth: int, share: float, units: tuple[str, ...]
) -> None:
    plan = compile_plan(stats, share, units=units)
    rng = np.random.default_rng(0)
    velocities = torch.tensor(rng.standard_normal((STEPS, 3, 8)))
    truth = truth_of(rng.standard_normal((STEPS + 1, 3, 8)), plan)
    loop = ClosedLoop(plan, stats, depth, truth)
    used, _ = run_alone(loop, velocities, plan.sigmas)
    row = loop.row()
    assert row.taps is not None and 0 < max(map(len, row.taps)) <= depth
    # The row, read back by the executor that plans are run with.
    again: StepExecutor[Any] = StepExecutor(row.schedule(plan.sigmas), plan.sigmas)
    for mean, step in zip(used, again.visited, strict=True):
        torch.testing.assert_close(mean, again.compute(step, velocities[step]))
        again.finish(again.after(step) - 1)
    assert loop.held == []


def test_a_fit_without_error_brings_the_run_back_to_the_uncached_one(
    stats: CalibrationStats,
) -> None:
    """If the truth can be reached with the velocities at hand, the loop finds out how."""
    plan = compile_plan(stats, 0.5, units=("step",))
    rng = np.random.default_rng(1)
    start, slope = rng.standard_normal((2, 3, 50))
    velocity = [start + plan.sigmas[s] * slope for s in range(STEPS)]
    latents = [np.zeros((3, 50))]
    for s in range(STEPS):
        latents.append(latents[s] + (plan.sigmas[s + 1] - plan.sigmas[s]) * velocity[s])
    loop = ClosedLoop(plan, stats, 4, truth_of(latents, plan))
    _, sample = run_alone(loop, [torch.tensor(v) for v in velocity], plan.sigmas)
    np.testing.assert_allclose(sample.numpy(), latents[STEPS], atol=1e-3)


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
    verify(stats, refined)
    assert refined.predicted.psnr_db != plan.predicted.psnr_db
    held = peak_bytes(refined.schedules, {}, stats.velocity_bytes, stats.output_bytes)
    assert refined.predicted.cache_bytes == held


@pytest.mark.parametrize(
    "options", [{"predictor": "published"}, {"predictor": "reuse"}, {"budget": 1.0}]
)
def test_a_plan_without_fitted_predictions_is_refused(
    stats: CalibrationStats, options: dict[str, Any]
) -> None:
    plan = compile_plan(stats, **({"budget": 0.7} | options))
    with pytest.raises(LayerCacheError, match="nothing to refine"):
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
    free = compile_plan(stats, 0.5, units=("step",))
    limit = stats.output_bytes + 3 * stats.velocity_bytes
    plan = compile_plan(stats, 0.5, units=("step",), max_cache_bytes=limit)
    assert plan.predicted.cache_bytes <= limit < free.predicted.cache_bytes
    assert refine(stats, plan).predicted.cache_bytes <= limit
    assert refine(stats, free).predicted.cache_bytes > limit


@pytest.mark.parametrize("units", [("step",), ("groups",), ("step", "groups")])
def test_a_refined_plan_is_run_as_the_loop_ran(
    stats: CalibrationStats, always_kept: None, units: tuple[str, ...]
) -> None:
    """Velocities that the scheduler gets under the refined plan are those of the fit."""
    from layercache.models.stepping import tapped_step
    from layercache.runtime import apply_plan

    means: list[torch.Tensor] = []
    original = ClosedLoop.compute

    def watching(self: ClosedLoop, step: int, velocity: torch.Tensor) -> Any:
        if step == 0:
            means.clear()
        means.append(original(self, step, velocity))
        return means[-1]

    plan = compile_plan(stats, 0.6, units=units)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClosedLoop, "compute", watching)
        refined = refine(stats, plan)
    verify(stats, refined)
    pipe, seen = tiny_pipeline(), {}

    def note(index: int, velocity: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        seen[index] = velocity
        return velocity

    from layercache.calibration.prompts import batches
    from layercache.models.pipelines import run_pipeline

    (batch,) = batches(PROMPTS, 0, 3, tiny_arguments() | {"num_inference_steps": STEPS})
    with torch.no_grad(), tapped_step(pipe.scheduler, note), apply_plan(pipe, refined):
        run_pipeline(pipe, batch.arguments)
    visited = [step for step, run in enumerate(refined.run_steps) if run]
    for mean, step in zip(means, visited, strict=True):
        torch.testing.assert_close(seen[step], mean, rtol=1e-4, atol=1e-4)


def test_refining_under_another_sampler(always_kept: None) -> None:
    from diffusers import UniPCMultistepScheduler

    def pipeline() -> Any:
        pipe = tiny_pipeline()
        pipe.scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
        return pipe

    found = calibrate(
        pipeline(), PROMPTS, num_inference_steps=STEPS, groups=2, lags=3, batch_size=3,
        call_kwargs=tiny_arguments(), progress=False,
    )  # fmt: skip
    plan = compile_plan(found, 0.6, units=("step",))
    refined = refine_plan(pipeline(), plan, found, PROMPTS, call_kwargs=tiny_arguments())
    verify(found, refined)
    assert refined.units != plan.units
    assert refined.run_steps == plan.run_steps
