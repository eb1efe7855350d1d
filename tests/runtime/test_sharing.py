"""Pipelines that share a process, a transformer, a scheduler; loops that are left or changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline

from layercache.runtime import apply_plan
from tests.models import zoo
from tests.runtime.harness import LoopPipeline, group, make_plan
from tests.runtime.pipelines import STEPS, build, plan_for, planned


class Stop(Exception):
    """Raised in the middle of a run."""


def test_two_pipelines_in_one_process_do_not_meet() -> None:
    first, call_first = build("QwenImagePipeline")
    second, call_second = build("QwenImagePipeline")
    uncached = call_second()
    with apply_plan(first, planned(first, call_first)):
        expected = call_first()
        assert torch.equal(call_second(), uncached)
        with apply_plan(second, planned(second, call_second, seed=1)) as run:
            other = call_second()
            assert torch.equal(call_first(), expected)
            assert torch.equal(call_second(), other)
        assert run.report().warnings == ()
        assert not torch.equal(other, expected)
        assert torch.equal(call_first(), expected)


@pytest.mark.parametrize("name", ["QwenImagePipeline", "StableDiffusion3Pipeline", "WanPipeline"])
def test_another_pipeline_may_share_the_transformer(name: str) -> None:
    first, call_first = build(name)
    second, call_second = build(name)
    second.transformer = first.transformer
    uncached = call_second()
    plan = planned(first, call_first)
    fresh, _ = build(name)
    # A scheduler that was never set has its training schedule, which is no run.
    first.scheduler = type(fresh.scheduler).from_config(fresh.scheduler.config)
    with apply_plan(first, plan) as run:
        assert torch.equal(call_second(), uncached)
        expected = call_first()
        assert not torch.equal(expected, uncached)
        assert torch.equal(call_second(), uncached)
        assert torch.equal(call_first(), expected)
        assert run.report().warnings == ()

        def stopping(pipe: Any, index: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            if index == 2:
                raise Stop
            return kwargs

        # A run that was broken off is over, for the other pipeline too.
        with pytest.raises(Stop):
            call_first(callback_on_step_end=stopping)
        assert run.held_bytes == 0
        assert torch.equal(call_second(), uncached)
        assert torch.equal(call_first(), expected)
        handle = first.transformer.register_forward_pre_hook(_stop_at(2))
        with pytest.raises(Stop):
            call_first()
        handle.remove()
        assert torch.equal(call_second(), uncached)

        def interrupting(pipe: Any, index: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            pipe._interrupt = index == 1
            return kwargs

        call_first(callback_on_step_end=interrupting)
        assert run.held_bytes == 0
        assert run.report().steps_seen == 2
        assert torch.equal(call_second(), uncached)
        assert torch.equal(call_first(), expected)
        # Calls inside the other pipeline's run that is interleaved with nothing: as without a plan.
        assert run.report().warnings == ()


def _stop_at(count: int) -> Any:
    calls = 0

    def hook(module: Any, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            raise Stop

    return hook


def test_a_plan_that_is_put_on_after_a_run_of_another_length() -> None:
    first, call_first = build("QwenImagePipeline")
    second, call_second = build("QwenImagePipeline")
    second.transformer = first.transformer
    plan = planned(first, call_first)
    uncached = call_second()
    call_first(num_inference_steps=3)
    with apply_plan(first, plan) as run:
        # The scheduler stands at the end of those three steps: that run is over.
        assert torch.equal(call_second(), uncached)
        call_first()
    assert run.report().warnings == ()


def test_latents_that_a_callback_changes_are_used() -> None:
    pipe, call = build("QwenImagePipeline")

    def doubling(pipe: Any, index: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {"latents": kwargs["latents"] * (2.0 if index == 1 else 1.0)}

    plan = planned(pipe, call)
    with apply_plan(pipe, plan) as run:
        plain = call()
        changed = call(callback_on_step_end=doubling)
        assert run.report().warnings == ()
        assert not torch.equal(plain, changed)
        assert torch.equal(call(callback_on_step_end=doubling), changed)
        assert torch.equal(call(), plain)


def test_one_generator_for_several_runs_gives_what_it_gives_without_interruption() -> None:
    pipe, call = build("QwenImagePipeline")
    with apply_plan(pipe, planned(pipe, call)):
        generator = torch.Generator().manual_seed(5)
        images = [call(generator=[generator]) for _ in range(2)]
        generator.manual_seed(5)
        assert torch.equal(call(generator=[generator]), images[0])
        assert torch.equal(call(generator=[generator]), images[1])
        assert not torch.equal(images[0], images[1])


def test_inference_mode_inside_a_pipeline_under_no_grad() -> None:
    pipe, call = build("FluxPipeline")
    with apply_plan(pipe, planned(pipe, call)) as run:
        expected = call()
        with torch.inference_mode():
            assert torch.allclose(call(), expected, atol=1e-5)
        assert torch.equal(call(), expected)
        assert run.report().warnings == ()


class Chunked(LoopPipeline):
    """A pipeline that denoises in two loops, with a progress bar each."""

    @torch.no_grad()
    def __call__(self, steps: int, start: int = 0, leave_at: int | None = None) -> torch.Tensor:
        self.scheduler.set_timesteps(steps)
        sigmas = self.scheduler.sigmas.tolist()
        latent = torch.zeros(1)
        times = list(enumerate(self.scheduler.timesteps))
        for chunk in (times[:3], times[3:]):
            with self.progress_bar(total=len(chunk)):
                for index, t in chunk:
                    with self.progress_bar(total=1):
                        # Something else that shows its progress, such as a preview.
                        pass
                    velocity = self.velocity(sigmas[index], latent)
                    latent = self.scheduler.step(velocity, t, latent, return_dict=False)[0]
        return latent


def test_a_run_in_two_loops_goes_on_in_the_second() -> None:
    pipe = Chunked(*zoo.build("QwenImageTransformer2DModel"))
    plan = make_plan(pipe, 6, [group("transformer_blocks", 0, 4, "##0#00")])
    with apply_plan(pipe, plan) as run:
        first = pipe(6)
        assert torch.equal(pipe(6), first)
    assert run.report().steps_seen == 6
    assert run.report().runs == 2
    assert run.report().warnings == ()


def image_to_image(components: dict[str, Any]) -> tuple[Any, Any]:
    image_pipe = StableDiffusion3Img2ImgPipeline(**components)
    image_pipe.set_progress_bar_config(disable=True)
    # There is no encoder here: what it would have made stands in.
    image_pipe.prepare_latents = lambda *_, **__: torch.ones(1, 4, 8, 8)

    def run_late(strength: float = 0.6) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return image_pipe(
            image=torch.randn(1, 4, 8, 8, generator=generator), strength=strength,
            prompt_embeds=torch.ones(1, 5, 24), negative_prompt_embeds=torch.zeros(1, 5, 24),
            pooled_prompt_embeds=torch.ones(1, 24), negative_pooled_prompt_embeds=torch.ones(1, 24),
            height=64, width=64, num_inference_steps=STEPS, generator=generator,
            output_type="latent",
        ).images  # fmt: skip

    return image_pipe, run_late


def test_image_to_image_starts_late_and_computes_what_it_has_no_anchor_for() -> None:
    pipe, _ = build("StableDiffusion3Pipeline")
    image_pipe, run_late = image_to_image(pipe.components)
    expected = run_late()
    # Runs steps 2, 3, 4: the anchor of step 2 was never computed, that of step 4 was.
    plan = plan_for(image_pipe, run_late, [group("transformer_blocks", 0, 4, "##0#0")])
    with apply_plan(image_pipe, plan) as run, pytest.warns(UserWarning, match="differed"):
        result = run_late()
    report = run.report()
    assert report.steps_seen == 3
    assert report.units[0].seen_predicted == {"call 0": 1}
    assert "transformer_blocks[0:4]: what step 2 predicts from was not stored" in report.warnings
    assert not torch.equal(result, expected)
    only_late = plan_for(image_pipe, run_late, [group("transformer_blocks", 0, 4, "##000")])
    with apply_plan(image_pipe, only_late), pytest.warns(UserWarning, match="differed"):
        assert torch.equal(run_late(), expected)


def test_text_to_image_and_image_to_image_of_one_set_of_components_take_turns() -> None:
    """`from_pipe` shares transformer and scheduler: the plan holds for both pipelines."""
    pipe, call = build("StableDiffusion3Pipeline")
    _, run_late = image_to_image(pipe.components)
    plan = plan_for(pipe, call, [group("transformer_blocks", 0, 4, "##0#0")])
    with apply_plan(pipe, plan) as run:
        whole = call()
        assert run.report().warnings == ()
        with pytest.warns(UserWarning, match="differed"):
            late = run_late()
        assert run.report().steps_seen == 3
        assert torch.equal(call(), whole)
        assert run.report().warnings == ()
        assert torch.equal(run_late(), late)
        assert torch.equal(call(), whole)
