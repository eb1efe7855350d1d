"""Models without an adapter: whole steps, hooked and as a scheduler, and what is refused."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from layercache import Budget, CalibrationStats, compile_plan
from layercache.calibration import calibrate, estimate_calibration
from layercache.errors import OptionError, StatsError, UnsupportedModelError
from layercache.runtime import LayerCacheScheduler, apply_plan, check_adapter, compile_blocks
from tests.pipelines.entry import Entry
from tests.pipelines.observe import run
from tests.pipelines.registry import BY_NAME, ENTRIES
from tests.pipelines.test_matrix import evenly_timed, measured

# A scheduler in place of hooks refuses runs that start late.
BARE = [e for e in ENTRIES if not e.grouped and "image-to-image" not in e.variant]
UNET = BY_NAME["StableDiffusionPipeline: a UNet that predicts a velocity"]


@pytest.mark.parametrize("entry", BARE, ids=lambda entry: entry.name)
def test_the_scheduler_makes_what_the_hooks_make(entry: Entry, tmp_path: Any) -> None:
    with entry.patches():
        pipe = entry.build()
        stats = evenly_timed(measured(entry, pipe))
        assert stats.num_groups == 0
        stats.save(tmp_path / "stats.npz")
        stats = CalibrationStats.load(tmp_path / "stats.npz")
        plan = compile_plan(stats, Budget(speedup=SPEEDUP))
        assert plan.component == entry.component
        with apply_plan(pipe, plan) as applied:
            hooked = run(entry, pipe)
        assert applied.report().warnings == ()
        calls: list[int] = []
        model = getattr(pipe, entry.component)
        handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
        pipe.scheduler = LayerCacheScheduler.from_plan(plan, pipe.scheduler)
        found = run(entry, pipe)
        handle.remove()
    assert len(calls) == plan.branches * sum(plan.run_steps) < plan.branches * plan.num_steps
    assert (found - hooked).abs().max() <= 1e-4 * hooked.abs().max()


SPEEDUP = 1.8


def test_groups_that_are_not_there_are_told() -> None:
    pipe, said = UNET.build(), list[str]()
    options: Any = {"num_inference_steps": 3, "call_kwargs": UNET.call(), "progress": False}
    for groups in (4, "auto", "blocks", "4"):
        with pytest.raises(UnsupportedModelError, match="no adapter knows UNet2DConditionModel"):
            calibrate(pipe, [UNET.prompt(1)], groups=groups, **options)
    for groups in (None, 0, "0"):
        stats = calibrate(pipe, [UNET.prompt(1)], groups=groups, log=said.append, **options)
        assert stats.num_groups == 0 and "no groups" in said[0]
    with pytest.raises(OptionError, match="no groups"):
        compile_plan(stats, 0.7, units="groups")
    with pytest.raises(UnsupportedModelError, match="no adapter knows"):
        check_adapter(pipe.unet)
    with pytest.raises(UnsupportedModelError, match="no adapter knows"):
        compile_blocks(pipe.unet)


@pytest.mark.parametrize("mode", ["replay", "residual"])
def test_no_groups_of_a_known_model(mode: str) -> None:
    entry = BY_NAME["StableDiffusion3Pipeline: text-to-image"]
    pipe = entry.build()
    bare = measured(entry, pipe, groups=0, mode=mode)
    full = measured(entry, pipe)
    assert (bare.num_groups, full.num_groups) == (0, 2)
    assert bare.velocities.tobytes() == full.velocities.tobytes()
    plan = compile_plan(evenly_timed(bare), 0.6)
    assert [unit.kind for unit in plan.units] == ["step"]
    with apply_plan(pipe, plan) as applied:
        run(entry, pipe)
    assert applied.report().warnings == ()


def test_a_change_of_the_calls_is_seen_without_groups() -> None:
    entry = BY_NAME["ZImagePipeline: guidance ends midway"]
    pipe = entry.build()
    bare, full = measured(entry, pipe, groups=0), measured(entry, pipe)
    assert bare.segments.max() == 1
    assert bare.segments.tolist() == full.segments.tolist()
    assert bare.loads[:, -1].tolist() == full.loads[:, -1].tolist()
    assert bare.loads.min() < 1


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_what_is_no_velocity_is_refused_before_anything_runs(
    scheduler: str, prediction: str
) -> None:
    pipe, calls = UNET.build(), list[int]()
    pipe.scheduler = getattr(diffusers, scheduler)(prediction_type=prediction, steps_offset=1)
    for module in (pipe.unet, pipe.vae):
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    for measure in (calibrate, estimate_calibration):
        with pytest.raises(StatsError, match=f"predicts '{prediction}'"):
            measure(pipe, [UNET.prompt(1)], num_inference_steps=3, call_kwargs=UNET.call())
    assert not calls


def test_two_calls_a_step_leave_no_groups_and_no_experts() -> None:
    entry = BY_NAME["StableDiffusion3Pipeline: Heun"]
    pipe, calls = entry.build(), list[int]()
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(StatsError, match="twice a step"):
        measured(entry, pipe, groups=2)
    assert not calls
    experts = BY_NAME["WanImageToVideoPipeline: image-to-video, two experts"]
    pipe = experts.build()
    pipe.scheduler = entry.build().scheduler
    with pytest.raises(StatsError, match="models take turns"):
        measured(experts, pipe, groups=None)


@pytest.mark.parametrize("solver", ["search", "dp", "greedy", "milp"])
def test_a_call_of_heun_s_counts_as_it_costs(solver: str) -> None:
    entry = BY_NAME["StableDiffusion3Pipeline: Heun"]
    stats = evenly_timed(measured(entry, entry.build()))
    total = 2 * stats.num_steps - 1
    for computed in range(2, stats.num_steps + 1):
        plan = compile_plan(stats, (computed + 0.01) / total, solver=solver)
        assert sum(plan.run_steps) <= computed
        assert plan.predicted.compute_share == pytest.approx(sum(plan.run_steps) / total)
        assert plan.predicted.psnr_db is not None
    # Ten milliseconds a call, and one around it.
    assert plan.predicted.speedup == pytest.approx(11 * total / (10 * sum(plan.run_steps) + total))


def test_a_denoiser_is_found_and_named() -> None:
    pipe = UNET.build()
    with pytest.raises(UnsupportedModelError, match=r"'transformer'.*unet, vae"):
        calibrate(pipe, [UNET.prompt(1)], component="transformer", call_kwargs=UNET.call())
    with pytest.raises(UnsupportedModelError, match="has the models"):
        calibrate(torch.nn.Module(), [{}])
