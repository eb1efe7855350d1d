"""Whole pipelines: every change between runs gives what a fresh pipeline gives."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from layercache.models import model_fingerprint
from layercache.models.stepping import sigmas_of
from layercache.plan import Plan
from layercache.runtime import apply_plan
from tests.runtime.harness import group, make_plan, random_units, step
from tests.runtime.pipelines import PIPELINES, STEPS


def build(name: str) -> tuple[Any, Any]:
    pipe, call = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


def plan_for(pipe: Any, call: Any, units: Any) -> Plan:
    """A plan on the noise levels that the pipeline really uses, which it may set by itself."""
    call()
    return make_plan(pipe, STEPS, units, sigmas=sigmas_of(pipe.scheduler))


def planned(pipe: Any, call: Any, seed: int = 0) -> Plan:
    lists = model_fingerprint(pipe.transformer)["block_lists"]
    return plan_for(pipe, call, random_units(lists, STEPS, random.Random(seed)))


def fresh(name: str, **arguments: Any) -> torch.Tensor:
    pipe, call = build(name)
    with apply_plan(pipe, planned(pipe, call)):
        return call(**arguments)


class Stop(Exception):
    """Raised in the middle of a run."""


def stopping(pipe: Any, index: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    if index == 2:
        raise Stop
    return kwargs


@pytest.mark.parametrize("name", PIPELINES)
def test_runs_do_not_influence_one_another(name: str) -> None:
    pipe, call = build(name)
    uncached = call()
    run = apply_plan(pipe, planned(pipe, call))
    first = call()
    assert not torch.equal(first, uncached)
    assert run.report().warnings == ()
    for changes in ({"size": 48}, {"images": 2}, {"guidance": 1.0}, {}):
        assert torch.equal(call(**changes), fresh(name, **changes)), changes
        assert run.report().warnings == ()
    with pytest.raises(Stop):
        call(callback_on_step_end=stopping)
    assert torch.equal(call(), first)
    handle = pipe.transformer.register_forward_pre_hook(_fails_at_third_call())
    with pytest.raises(Stop):
        call()
    handle.remove()
    assert torch.equal(call(), first)
    assert run.report().cache_bytes_seen == run.report().cache_bytes_planned
    run.remove()
    assert torch.equal(call(), uncached)


def _fails_at_third_call() -> Any:
    calls = 0

    def hook(module: Any, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Stop

    return hook


def test_guidance_that_ends_midway_is_computed_and_reported() -> None:
    pipe, call = build("ZImagePipeline")
    plan = plan_for(pipe, call, [step("##000")])
    uncached = call(cfg_truncation=0.5)
    with apply_plan(pipe, plan) as run:
        result = call(cfg_truncation=0.5)
    assert result.isfinite().all()
    assert not torch.equal(result, uncached)
    assert "inputs changed shape, dtype or device within a run" in run.report().warnings
    # From the change on nothing is stored to predict from, so the rest is computed.
    assert run.report().units[0].seen_predicted["call 0"] < 3


def test_two_pipelines_in_one_process_do_not_meet() -> None:
    first, call_first = build("QwenImagePipeline")
    _, call_second = build("QwenImagePipeline")
    uncached = call_second()
    with apply_plan(first, planned(first, call_first)):
        expected = call_first()
        assert torch.equal(call_second(), uncached)
        assert torch.equal(call_first(), expected)


def test_another_pipeline_may_share_the_transformer() -> None:
    first, call_first = build("QwenImagePipeline")
    second, call_second = build("QwenImagePipeline")
    second.transformer = first.transformer
    uncached = call_second()
    with apply_plan(first, planned(first, call_first)) as run:
        expected = call_first()
        assert torch.equal(call_second(), uncached)
        assert torch.equal(call_first(), expected)
        assert run.report().warnings == ()


def test_image_to_image_starts_late_and_computes_what_it_has_no_anchor_for() -> None:
    from diffusers import StableDiffusion3Img2ImgPipeline

    pipe, _ = build("StableDiffusion3Pipeline")
    image_pipe = StableDiffusion3Img2ImgPipeline(**pipe.components)
    image_pipe.set_progress_bar_config(disable=True)

    def run_late() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return image_pipe(
            image=torch.randn(1, 4, 8, 8, generator=generator), strength=0.6,
            prompt_embeds=torch.ones(1, 5, 24), negative_prompt_embeds=torch.zeros(1, 5, 24),
            pooled_prompt_embeds=torch.ones(1, 24), negative_pooled_prompt_embeds=torch.ones(1, 24),
            height=64, width=64, num_inference_steps=STEPS, generator=generator,
            output_type="latent",
        ).images  # fmt: skip

    # There is no encoder here: what it would have made stands in.
    image_pipe.prepare_latents = lambda *_, **__: torch.ones(1, 4, 8, 8)
    expected = run_late()
    # Runs steps 2, 3, 4: the anchor of step 2 was never computed, that of step 4 was.
    plan = plan_for(image_pipe, run_late, [group("transformer_blocks", 0, 4, "##0#0")])
    with apply_plan(image_pipe, plan) as run:
        result = run_late()
    report = run.report()
    assert report.steps_seen == 3
    assert report.units[0].seen_predicted == {"call 0": 1}
    assert "transformer_blocks[0:4]: what step 2 predicts from was not stored" in report.warnings
    assert not torch.equal(result, expected)
    only_late = plan_for(image_pipe, run_late, [group("transformer_blocks", 0, 4, "##000")])
    with apply_plan(image_pipe, only_late):
        assert torch.equal(run_late(), expected)
