"""A plan of whole steps as a scheduler. Oracle: the hooked pipeline under the same plan."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, WanPipeline
from torch import Tensor

from layercache.errors import ModelMismatchError, PlanError, UnsupportedModelError
from layercache.models.stepping import sigmas_of
from layercache.plan import Plan
from layercache.runtime import LayerCacheScheduler, apply_plan
from tests.models.zoo import build as build_model
from tests.runtime.harness import LoopPipeline, group, make_plan, random_units, step
from tests.runtime.pipelines import PIPELINES, STEPS, build, plan_for, quiet, wan_with_two_experts
from tests.runtime.test_executor import SOLVERS, Linear, published_taps


def counted(pipe: Any, call: Any) -> tuple[Tensor, int]:
    calls: list[int] = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    result = call()
    handle.remove()
    return result, len(calls)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PIPELINES)
def test_the_scheduler_makes_what_the_hooks_make(name: str, seed: int) -> None:
    pipe, call = build(name)
    (unit,) = random_units({}, STEPS, random.Random(seed))
    plan = plan_for(pipe, call, [unit])
    uncached = call()
    with apply_plan(pipe, plan):
        expected = call()
    plain = pipe.scheduler
    pipe.scheduler = LayerCacheScheduler.from_plan(plan, plain)
    for _ in range(2):
        result, calls = counted(pipe, call)
        assert calls == plan.branches * unit.cells.count("#")
        assert (result - expected).abs().max() < 1e-5 * expected.abs().max()
    # The scheduler that was given is untouched.
    pipe.scheduler = plain
    assert torch.equal(call(), uncached)


# QwenImage hands over sigmas, which DPM++ does not take.
@pytest.mark.parametrize(
    ("name", "solver"),
    [("QwenImagePipeline", "UniPC")]
    + [
        (name, solver) for name in ("WanPipeline", "StableDiffusion3Pipeline") for solver in SOLVERS
    ],
)
def test_before_the_first_skipped_step_the_other_solver_makes_its_own(
    name: str, solver: str
) -> None:
    pipe, call = build(name)
    pipe.scheduler = SOLVERS[solver]()
    uncached = call()
    plan = plan_for(pipe, call, [step("###0#", [(), (), (), (), (0.4, -0.2)])])
    everything = plan.model_copy(update={"units": (step("#####"),)})
    with apply_plan(pipe, plan):
        expected = call()
    plain = pipe.scheduler
    pipe.scheduler = LayerCacheScheduler.from_plan(plan, plain)
    assert (call() - expected).abs().max() < 1e-5 * expected.abs().max()
    pipe.scheduler = LayerCacheScheduler.from_plan(everything, plain)
    assert torch.equal(call(), uncached)


def test_two_experts() -> None:
    pipe, call = quiet(*wan_with_two_experts())
    call()

    class Named:
        transformer, scheduler = pipe.transformer, pipe.scheduler

    plan = make_plan(Named, STEPS, [step("##0#0")], sigmas=sigmas_of(pipe.scheduler))
    pipe.scheduler = LayerCacheScheduler.from_plan(plan, pipe.scheduler)
    result, calls = counted(pipe, call)
    # Steps 0 and 1 are the first expert's; the boundary is read from the scheduler.
    assert calls == 4
    assert result.isfinite().all()


def test_a_linear_series_is_extrapolated_exactly() -> None:
    pipe = Linear(*build_model("QwenImageTransformer2DModel"))
    cells = "##0#00"
    uncached = pipe(6)
    taps = published_taps(cells, sigmas_of(pipe.scheduler))
    plan = make_plan(pipe, 6, [step(cells, taps)])

    class Short(Linear):
        """The same loop over however many steps the scheduler has."""

        def __call__(self, steps: int, start: int = 0, leave_at: int | None = None) -> Tensor:
            latent = torch.linspace(-1.0, 2.0, uncached.numel()).reshape(uncached.shape)
            self.scheduler.set_timesteps(steps)
            for sigma, t in zip(
                self.scheduler.sigmas.tolist(), self.scheduler.timesteps, strict=False
            ):
                with torch.no_grad():
                    velocity = self.velocity(sigma, latent)
                latent = self.scheduler.step(velocity, t, latent, return_dict=False)[0]
            return latent

    short = Short(pipe.transformer, pipe.inputs)
    short.scheduler = LayerCacheScheduler.from_plan(
        plan, FlowMatchEulerDiscreteScheduler(shift=3.0)
    )
    torch.testing.assert_close(short(6), uncached, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_type(dtype: torch.dtype) -> None:
    pipe = LoopPipeline(*build_model("QwenImageTransformer2DModel"))
    plan = make_plan(pipe, 4, [step("##00", [(), (0.5,), (), ()])])
    scheduler = LayerCacheScheduler.from_plan(plan)
    scheduler.set_timesteps(4)
    sample = torch.ones(1, 4, dtype=dtype)
    for t in scheduler.timesteps:
        output = scheduler.step(torch.full_like(sample, 0.25), t, sample)
        assert output.prev_sample.dtype is dtype
        assert output.prev_sample is output[0]
        sample = output[0]
    assert torch.allclose(sample.float(), torch.full((1, 4), 0.75), atol=1e-2)


# -- files -----------------------------------------------------------------------------------------


def plan_and_pipeline(name: str = "WanPipeline") -> tuple[Plan, Any, Any]:
    pipe, call = build(name)
    return plan_for(pipe, call, [step("##0#0", [(), (0.3,), (), (0.2, -0.1), ()])]), pipe, call


def test_it_is_saved_and_read(tmp_path: Path) -> None:
    plan, pipe, call = plan_and_pipeline()
    pipe.scheduler = LayerCacheScheduler.from_plan(plan, pipe.scheduler)
    expected = call()
    pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    again = LayerCacheScheduler.from_pretrained(tmp_path / "scheduler")
    assert again.plan == plan
    assert again.config.shift == 3.0
    pipe.scheduler = again
    assert torch.equal(call(), expected)


def test_every_pipeline_s_is_read_in_another_process(tmp_path: Path) -> None:
    for name in PIPELINES:
        plan, pipe, call = plan_and_pipeline(name)
        pipe.scheduler = LayerCacheScheduler.from_plan(plan, pipe.scheduler)
        pipe.scheduler.save_pretrained(tmp_path / name)
        torch.save(call(), tmp_path / name / "expected.pt")
    code = f"""
import torch
from pathlib import Path
from layercache.runtime import LayerCacheScheduler
from tests.runtime.pipelines import PIPELINES, build
for name in PIPELINES:
    folder = Path({str(tmp_path)!r}) / name
    pipe, call = build(name)
    pipe.scheduler = LayerCacheScheduler.from_pretrained(folder)
    found, expected = call(), torch.load(folder / "expected.pt")
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max(), name
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_whole_pipeline_is_saved_with_it(tmp_path: Path) -> None:
    plan, pipe, call = plan_and_pipeline()
    pipe.scheduler = LayerCacheScheduler.from_plan(plan, pipe.scheduler)
    expected = call()
    pipe.save_pretrained(tmp_path)
    again = WanPipeline.from_pretrained(tmp_path, vae=None, text_encoder=None, tokenizer=None)
    assert isinstance(again.scheduler, LayerCacheScheduler)
    pipe.scheduler = again.scheduler
    assert torch.equal(call(), expected)


# -- what it cannot do -----------------------------------------------------------------------------


def test_plans_with_cached_groups_are_refused() -> None:
    pipe, call = build("WanPipeline")
    units = [step("##0##"), group("blocks", 0, 4, "##.0#")]
    with pytest.raises(PlanError, match=r"blocks\[0:4\].*: 1.*apply_plan"):
        LayerCacheScheduler.from_plan(plan_for(pipe, call, units), pipe.scheduler)
    # Groups that are only computed do no harm.
    units = [step("##0##"), group("blocks", 0, 4, "##.##")]
    LayerCacheScheduler.from_plan(plan_for(pipe, call, units), pipe.scheduler)


def test_other_schedules_are_refused() -> None:
    plan, pipe, _ = plan_and_pipeline()
    scheduler = LayerCacheScheduler.from_plan(plan, pipe.scheduler)
    with pytest.raises(ModelMismatchError, match="asks for 4 steps and the plan is for 5"):
        scheduler.set_timesteps(4)
    with pytest.raises(ModelMismatchError, match="another noise schedule"):
        scheduler.set_timesteps(sigmas=[0.9, 0.7, 0.5, 0.3, 0.1])
    other = LayerCacheScheduler.from_plan(plan, FlowMatchEulerDiscreteScheduler(shift=2.0))
    with pytest.raises(ModelMismatchError, match="another noise schedule"):
        other.set_timesteps(5)
    with pytest.raises(ModelMismatchError, match="starts at step 2"):
        scheduler.set_begin_index(2)


def test_noise_and_unknown_schedulers_are_refused() -> None:
    plan, _, _ = plan_and_pipeline()
    noisy = LayerCacheScheduler.from_plan(plan, FlowMatchLCMScheduler(shift=3.0))
    with pytest.raises((UnsupportedModelError, ModelMismatchError)):
        noisy.set_timesteps(5)
    noisy = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    with pytest.raises(UnsupportedModelError, match="draws noise"):
        LayerCacheScheduler.from_plan(plan, noisy).set_timesteps(5)
    other = plan.model_copy(update={"setting": {"scheduler": "UniPCMultistepScheduler"}})
    with pytest.raises(UnsupportedModelError, match="UniPCMultistepScheduler"):
        LayerCacheScheduler.from_plan(other)
    with pytest.raises(PlanError, match="needs a plan"):
        LayerCacheScheduler()


def test_without_the_other_scheduler_the_number_of_steps_is_compared() -> None:
    plan, pipe, call = plan_and_pipeline()
    with apply_plan(pipe, plan):
        expected = call()
    pipe.scheduler = LayerCacheScheduler.from_plan(plan)
    assert (call() - expected).abs().max() < 1e-5 * expected.abs().max()
    with pytest.raises(ModelMismatchError, match="asks for 6 steps"):
        pipe.scheduler.set_timesteps(6)
