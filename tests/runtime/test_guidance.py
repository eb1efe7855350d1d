"""Guidance of every kind: one to three calls a step, batched, ending midway, by two experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from layercache.models import model_fingerprint
from layercache.models.stepping import sigmas_of
from layercache.plan import Plan
from layercache.runtime import apply_plan
from tests.runtime.harness import group, make_plan, step
from tests.runtime.pipelines import STEPS, build, plan_for, planned, quiet, wan_with_two_experts

BLOCKS = "transformer_blocks"


def test_batched_guidance_that_ends_midway_is_computed_and_reported() -> None:
    pipe, call = build("ZImagePipeline")
    plan = plan_for(pipe, call, [step("##000")])
    uncached = call(cfg_truncation=0.5)
    with (
        apply_plan(pipe, plan) as run,
        pytest.warns(UserWarning, match="a run differed from its plan"),
    ):
        result = call(cfg_truncation=0.5)
    assert result.isfinite().all()
    assert not torch.equal(result, uncached)
    assert "inputs changed shape, dtype or device within a run" in run.report().warnings
    # From the change on nothing is stored to predict from, so the rest is computed.
    assert run.report().units[0].seen_predicted["call 0"] < 3


def test_sequential_guidance_that_ends_midway() -> None:
    """Steps 3 and 4 make one call instead of two."""
    pipe, call = build("Lumina2Pipeline")
    plan = plan_for(pipe, call, [step("##000")])
    uncached = call(cfg_trunc_ratio=0.6)
    with (
        apply_plan(pipe, plan) as run,
        pytest.warns(UserWarning, match="a run differed from its plan"),
    ):
        result = call(cfg_trunc_ratio=0.6)
    unit = run.report().units[0]
    # The first step with one call has no guided output to predict from; it is found out after the
    # call was answered, and what follows is computed.
    assert unit.seen_predicted == {"call 0": 2, "call 1": 1}
    assert unit.seen_computed == {"call 0": 3, "call 1": 2}
    assert "step: the calls at step 3 are not those that it repeats" in run.report().warnings
    assert (result - uncached).norm() < 0.5 * uncached.norm()


def test_groups_go_on_where_guidance_ends() -> None:
    pipe, call = build("Lumina2Pipeline")
    lists = model_fingerprint(pipe.transformer)["block_lists"]
    units = [group(name, 0, count, "##00#") for name, count in lists.items()]
    with apply_plan(pipe, plan_for(pipe, call, units)) as run:
        call(cfg_trunc_ratio=0.6)
    unit = run.report().units[0]
    assert unit.seen_predicted == {"call 0": 2, "call 1": 1}
    assert unit.seen_computed == {"call 0": 3, "call 1": 2}


def test_three_calls_a_step_keep_apart() -> None:
    """Guidance by skipped layers (SD3): a third call, of a part of the blocks."""
    pipe, call = build("StableDiffusion3Pipeline")
    everywhere: dict[str, Any] = {
        "skip_guidance_layers": [1, 2], "skip_layer_guidance_start": -1.0,
        "skip_layer_guidance_stop": 1.0,
    }  # fmt: skip
    units = [group(BLOCKS, 0, 2, "##1#0"), group(BLOCKS, 2, 4, "#0##1")]
    plan = plan_for(pipe, lambda: call(**everywhere), units)
    uncached = call(**everywhere)
    with apply_plan(pipe, plan) as run:
        result = call(**everywhere)
    assert run.report().warnings == ()
    assert set(run.report().units[0].seen_computed) == {"call 0", "call 1"}
    assert not torch.equal(result, uncached)
    assert not torch.equal(result, call())
    # Exact where everything is computed, and with the step unit too.
    whole = plan_for(pipe, lambda: call(**everywhere), [step("##0#0")])
    with apply_plan(pipe, whole) as run:
        assert (call(**everywhere) - uncached).norm() < uncached.norm()
    assert run.report().warnings == ()


def test_a_third_call_that_begins_midway_is_computed() -> None:
    pipe, call = build("StableDiffusion3Pipeline")
    late: dict[str, Any] = {
        "skip_guidance_layers": [1], "skip_layer_guidance_start": 0.3,
        "skip_layer_guidance_stop": 1.0,
    }  # fmt: skip
    plan = plan_for(pipe, call, [step("##000")])
    with apply_plan(pipe, plan) as run, pytest.warns(UserWarning, match="differed"):
        assert call(**late).isfinite().all()
    unit = run.report().units[0]
    assert unit.seen_predicted["call 0"] == 1
    assert unit.seen_computed["call 0"] == 4


def one_expert(pipe: Any, call: Any, component: str, units: Any) -> Plan:
    call()
    model = pipe.transformer if component == "transformer" else pipe.transformer_2

    class Named:
        transformer, scheduler = model, pipe.scheduler

    return make_plan(Named, STEPS, units, sigmas=sigmas_of(pipe.scheduler))


def test_two_experts_have_a_plan_each_over_the_steps_of_the_whole_run() -> None:
    pipe, call = quiet(*wan_with_two_experts())
    uncached = call()
    sigmas = sigmas_of(pipe.scheduler)[:-1]
    high = sum(sigma >= 0.7 for sigma in sigmas)
    assert 0 < high < STEPS
    # The high-noise expert makes steps 0 to 2, the other the rest.
    assert high == 3
    units_high = [step("##0##"), group("blocks", 0, 4, "#0.#0")]
    units_low = [step("#####"), group("blocks", 1, 3, "####0")]
    plan_high = one_expert(pipe, call, "transformer", units_high)
    plan_low = one_expert(pipe, call, "transformer_2", units_low)
    for order in ("high first", "low first"):
        first = apply_plan(pipe, plan_high)
        second = apply_plan(pipe, plan_low, component="transformer_2")
        result = call()
        assert not torch.equal(result, uncached)
        assert torch.equal(call(), result)
        for run, mine in ((first, {0, 1, 2}), (second, {3, 4})):
            report = run.report()
            assert report.warnings == (), order
            assert report.steps_seen == len(mine)
            assert report.steps_elsewhere == STEPS - len(mine)
            assert run.held_bytes == 0
        assert first.report().units[0].seen_predicted == {"cond": 1, "uncond": 1}
        assert second.report().units[1].seen_predicted == {"cond": 1, "uncond": 1}
        (first if order == "high first" else second).remove()
        (second if order == "high first" else first).remove()
        assert "step" not in vars(pipe.scheduler)
        assert "progress_bar" not in vars(pipe)
        assert torch.equal(call(), uncached)


def test_what_one_expert_stored_is_freed_although_the_other_takes_over() -> None:
    pipe, call = quiet(*wan_with_two_experts())
    # Steps 3 and 4, which would read this, are the other expert's.
    plan = one_expert(pipe, call, "transformer", [group("blocks", 0, 4, "###00")])
    held: list[int] = []
    with apply_plan(pipe, plan) as run:

        def note(pipe: Any, index: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            held.append(run.held_bytes)
            return kwargs

        call(callback_on_step_end=note)
    assert held[2] > 0
    assert held[-1] == 0


def test_one_expert_under_a_plan_leaves_the_other_alone() -> None:
    pipe, call = quiet(*wan_with_two_experts())
    plan = one_expert(pipe, call, "transformer_2", [group("blocks", 0, 4, "####0")])
    with apply_plan(pipe, plan, component="transformer_2") as run:
        call()
    assert run.report().warnings == ()
    assert run.report().units[0].seen_predicted == {"cond": 1, "uncond": 1}


@pytest.mark.parametrize("name", ["QwenImagePipeline", "WanPipeline"])
def test_several_images_are_what_they_are_alone(name: str) -> None:
    pipe, call = build(name)
    with apply_plan(pipe, planned(pipe, call)) as run:
        together: Tensor = call(images=3)
        # The seeds are 0, 1, 2, so the first of three is the one of a run of one.
        alone = call(images=1)
    assert (together[:1] - alone).abs().max() < 1e-4 * alone.abs().max()
    assert run.report().warnings == ()
