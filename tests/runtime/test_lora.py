"""LoRA adapters that come, go and change their scale while a plan is on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from layercache.models import model_fingerprint
from layercache.runtime import apply_plan
from tests.runtime.harness import LoopPipeline, make_plan, step, traces
from tests.runtime.mixed import MIXED, STEPS, pipeline
from tests.runtime.pipelines import build, plan_for

TARGETS = ["to_q", "to_k", "to_v"]


def config() -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=TARGETS)


def weights(seed: int) -> dict[str, torch.Tensor]:
    """The state dict of one adapter, as it stands in a file."""
    torch.manual_seed(seed)
    model = pipeline().transformer
    model.add_adapter(config(), adapter_name="made")
    return {
        f"transformer.{name}": value
        for name, value in get_peft_model_state_dict(model, adapter_name="made").items()
    }


def load(pipe: LoopPipeline, name: str, seed: int) -> None:
    pipe.transformer.load_lora_adapter(weights(seed), adapter_name=name, prefix="transformer")


def prepared(*actions: Callable[[Any], None]) -> LoopPipeline:
    pipe = pipeline()
    for action in actions:
        action(pipe)
    return pipe


FIRST = ("first", 1)
SECOND = ("second", 2)
CHANGES: dict[str, Callable[[Any], None]] = {
    "load": lambda pipe: load(pipe, *FIRST),
    "load another": lambda pipe: load(pipe, *SECOND),
    "choose": lambda pipe: pipe.transformer.set_adapters(["first"], [1.0]),
    "rescale": lambda pipe: pipe.transformer.set_adapters(["first"], [0.25]),
    "both": lambda pipe: pipe.transformer.set_adapters(["first", "second"], [0.5, 1.5]),
    "switch off": lambda pipe: pipe.transformer.disable_lora(),
    "switch on": lambda pipe: pipe.transformer.enable_lora(),
    "fuse": lambda pipe: pipe.transformer.fuse_lora(),
    "unfuse": lambda pipe: pipe.transformer.unfuse_lora(),
    "unload": lambda pipe: pipe.transformer.unload_lora(),
}


def test_every_change_between_runs_gives_what_a_fresh_pipeline_gives() -> None:
    pipe = pipeline()
    plan = make_plan(pipe, STEPS, MIXED)
    pipe(1)
    before = traces(pipe.transformer)
    run = apply_plan(pipe, plan)
    without = pipe(STEPS)
    done: list[Callable[[Any], None]] = []
    results: dict[str, torch.Tensor] = {}
    for name, change in CHANGES.items():
        done.append(change)
        change(pipe)
        results[name] = pipe(STEPS)
        fresh = prepared(*done)
        with apply_plan(fresh, plan):
            assert torch.equal(results[name], fresh(STEPS)), name
        assert run.report().warnings == (), name
    assert not torch.equal(results["load"], without)
    assert not torch.equal(results["rescale"], results["choose"])
    assert torch.equal(results["switch off"], without)
    # Fusing and unfusing adds to the weights and takes away again, in floating point.
    assert torch.allclose(results["unload"], without, atol=1e-5)
    run.remove()
    named = {k: v for k, v in traces(pipe.transformer).items() if k in before}
    assert {k for k, v in named.items() if "forward" in v} == {
        k for k, v in before.items() if "forward" in v
    }


@pytest.mark.parametrize("name", ["load", "rescale", "both", "switch off", "unload"])
def test_a_change_in_the_middle_of_a_run_drops_what_is_stored(name: str) -> None:
    pipe = pipeline()
    plan = make_plan(pipe, STEPS, [step("##0000")])
    if name != "load":
        load(pipe, *FIRST)
        load(pipe, *SECOND)
        CHANGES["choose"](pipe)
    with apply_plan(pipe, plan) as run:
        tapped = pipe.scheduler.step

        def changing(*args: Any, **kwargs: Any) -> Any:
            result = tapped(*args, **kwargs)
            if pipe.scheduler._step_index == 4:
                CHANGES[name](pipe)
                assert run.held_bytes == 0
            return result

        pipe.scheduler.step = changing
        with pytest.warns(UserWarning, match="differed from its plan"):
            pipe(STEPS)
        pipe.scheduler.step = tapped
        # Steps 2 and 3 are predicted, the two that follow the change are computed.
        assert run.report().units[0].seen_predicted == {"cond": 2, "uncond": 2}
    assert "step" not in vars(pipe.scheduler)
    assert "set_adapters" not in vars(pipe.transformer)


def test_a_plan_serves_the_model_with_adapters_and_says_so() -> None:
    pipe = pipeline()
    plan = make_plan(pipe, STEPS, MIXED, setting={"lora": []})
    load(pipe, *FIRST)
    assert model_fingerprint(pipe.transformer) == plan.model.model_dump()
    with pytest.warns(UserWarning, match="lora is"):
        apply_plan(pipe, plan).remove()


def test_a_change_of_the_ip_adapter_scale_drops_what_is_stored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe, call = build("FluxPipeline")
    # No image encoder is loaded here, so there is nothing to rescale.
    monkeypatch.setattr(type(pipe), "set_ip_adapter_scale", lambda self, scale: None)
    plan = plan_for(pipe, call, [step("##000")])

    def rescale(pipe: Any, index: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == 2:
            assert run.held_bytes > 0
            pipe.set_ip_adapter_scale(0.5)
            assert run.held_bytes == 0
        return kwargs

    with apply_plan(pipe, plan) as run, pytest.warns(UserWarning, match="differed"):
        call(callback_on_step_end=rescale)
    assert run.report().units[0].seen_predicted == {"cond": 1, "uncond": 1}
    assert "set_ip_adapter_scale" not in vars(pipe)
