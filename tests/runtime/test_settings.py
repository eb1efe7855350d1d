"""A run in another setting than its plan's: in the report, and in one warning."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance

from layercache.models.calling import call_setting, latent_shape
from layercache.runtime import apply_plan
from tests.runtime import modular
from tests.runtime.harness import step
from tests.runtime.pipelines import PIPELINES, STEPS, build, plan_for, quiet, wan_with_two_experts

UNITS = [step("##0#0")]


def setting_seen(pipe: Any, call: Any) -> dict[str, Any]:
    """What a plain run has: what calibration would record of it."""
    found: dict[str, Any] = {}
    original = pipe.scheduler.step

    def watching(velocity: Any, time: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        found.update(call_setting(pipe), latent_shape=latent_shape(sample))
        return original(velocity, time, sample, *args, **kwargs)

    pipe.scheduler.step = watching
    call()
    del pipe.scheduler.step
    return found


def said(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if str(w.message).startswith("LayerCache")]


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("change", [{"size": 64}, {"guidance": 7.0}, {"guidance": 1.0}])
def test_a_change_of_the_call_is_said_once(name: str, change: dict[str, Any]) -> None:
    pipe, call = build(name)
    setting = setting_seen(pipe, call)
    plan = plan_for(pipe, call, UNITS).model_copy(update={"setting": setting})
    with warnings.catch_warnings(record=True) as caught, apply_plan(pipe, plan) as run:
        warnings.simplefilter("always")
        call()
        assert run.report().warnings == () and said(caught) == []
        call(images=2)
        assert run.report().warnings == () and said(caught) == []
        call(**change)
        texts = run.report().warnings
        assert texts
        assert run.report().to_dict()["warnings"] == list(texts)
        (key,) = change
        word = "latents" if key == "size" else "scale is 4.0 in the plan"
        assert any(word in text for text in texts), texts
        call(**change)
        assert len(said(caught)) == 1
        assert all(text in said(caught)[0] for text in texts)
        call()
        assert run.report().warnings == ()


@pytest.mark.parametrize("name", ["QwenImagePipeline", "WanPipeline", "Lumina2Pipeline"])
def test_guidance_that_is_switched_off_shows_in_the_number_of_calls(name: str) -> None:
    pipe, call = build(name)
    plan = plan_for(pipe, call, UNITS)
    assert plan.branches == 2
    with apply_plan(pipe, plan) as run:
        with pytest.warns(UserWarning, match="was called 1 times a step and the plan is for 2"):
            call(guidance=1.0)
        assert (run.report().calls_seen, run.report().calls_planned) == (1, 2)
    alone = plan_for(pipe, lambda: call(guidance=1.0), UNITS)
    assert alone.branches == 1
    with apply_plan(pipe, alone), pytest.warns(UserWarning, match="called 2 times a step"):
        call()


def test_frames_are_compared() -> None:
    pipe, call = build("WanPipeline")
    setting = {"num_frames": 9, "height": 32}
    plan = plan_for(pipe, call, UNITS).model_copy(update={"setting": setting})
    with apply_plan(pipe, plan) as run, pytest.warns(UserWarning, match="num_frames is 9"):
        call()
    assert run.report().warnings == ("num_frames is 9 in the plan and 5 here",)


def test_what_the_pipeline_rounds_is_no_difference_where_the_latents_are_known() -> None:
    pipe, call = build("QwenImagePipeline")
    shape = setting_seen(pipe, call)["latent_shape"]
    setting = {"height": 33, "width": 33, "latent_shape": shape}
    plan = plan_for(pipe, call, UNITS).model_copy(update={"setting": setting})
    with apply_plan(pipe, plan) as run:
        call()
    assert run.report().warnings == ()


def test_what_was_said_when_the_plan_was_put_on_stands_in_every_report_and_is_not_said_again() -> (
    None
):
    pipe, call = build("WanPipeline")
    setting = {"scheduler": "UniPCMultistepScheduler", "dtype": "bfloat16"}
    plan = plan_for(pipe, call, UNITS).model_copy(update={"setting": setting})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with apply_plan(pipe, plan) as run:
            for _ in range(2):
                call()
                assert any("UniPCMultistepScheduler" in text for text in run.report().warnings)
                assert any("bfloat16" in text for text in run.report().warnings)
    assert len(said(caught)) == 1


def test_a_plan_of_an_expert_that_makes_no_last_step_warns_too() -> None:
    pipe, call = quiet(*wan_with_two_experts())
    setting = {"guidance_scale": 3.0}
    plan = plan_for(pipe, call, UNITS).model_copy(update={"setting": setting, "branches": 2})
    with apply_plan(pipe, plan) as run, pytest.warns(UserWarning, match="guidance_scale is 3.0"):
        call()
    assert run.report().steps_elsewhere > 0


@pytest.mark.parametrize("name", ["qwenimage", "wan"])
@pytest.mark.parametrize("change", ["size", "scale", "off"])
def test_modular_pipelines_keep_their_setting_elsewhere(name: str, change: str) -> None:
    pipe, call = modular.build(name)
    setting = {"guider": "ClassifierFreeGuidance", "guider_scale": pipe.guider.guidance_scale,
               "height": 64 if name == "qwenimage" else 32}  # fmt: skip
    plan = modular.plan_of(pipe, call, setting=setting)
    assert plan.branches == 2
    with apply_plan(pipe, plan) as run:
        call()
        assert run.report().warnings == ()
        more: dict[str, Any] = {}
        if change == "size":
            more, words = {"height": 96}, "height is"
        elif change == "scale":
            pipe.guider = ClassifierFreeGuidance(guidance_scale=9.0)
            words = "guider_scale is"
        else:
            pipe.guider = ClassifierFreeGuidance(guidance_scale=1.0)
            words = "called 1 times a step and the plan is for 2"
        with pytest.warns(UserWarning, match=words):
            assert call(**more).isfinite().all()
        assert any(words in text for text in run.report().warnings)


def test_image_to_image_under_the_plan_of_text_to_image_says_which_pipeline_ran() -> None:
    from tests.runtime.test_sharing import image_to_image

    pipe, call = build("StableDiffusion3Pipeline")
    other, run_late = image_to_image(pipe.components)
    setting = {"pipeline": type(pipe).__name__}
    plan = plan_for(pipe, call, UNITS).model_copy(update={"setting": setting})
    with apply_plan(pipe, plan) as run, pytest.warns(UserWarning, match="pipeline is"):
        run_late()
        assert any(type(other).__name__ in text for text in run.report().warnings)
    assert torch.is_tensor(run_late())
    assert len(plan.sigmas) == STEPS + 1
