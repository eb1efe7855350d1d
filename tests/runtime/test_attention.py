"""Attention backends that are chosen before, under and in the middle of runs with a plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from layercache.models import model_fingerprint
from layercache.runtime import apply_plan
from tests.models.zoo import build
from tests.runtime.harness import LoopPipeline, group, make_plan, step

STEPS = 4
BACKENDS = ("native", "_native_math", "flex")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["QwenImageTransformer2DModel", "FluxTransformer2DModel", "WanTransformer3DModel"]
)
def test_every_backend_of_the_cpu(name: str, backend: str) -> None:
    pipe = LoopPipeline(*build(name))
    if backend == "flex":
        # It takes no mask of this kind.
        pipe.inputs.pop("encoder_hidden_states_mask", None)
    lists = model_fingerprint(pipe.transformer)["block_lists"]
    units = [step("###0"), *(group(n, 0, count, "#0#.") for n, count in lists.items())]
    plan = make_plan(pipe, STEPS, units)
    with apply_plan(pipe, plan) as run:
        expected = pipe(STEPS)
        pipe.transformer.set_attention_backend(backend)
        result = pipe(STEPS)
        assert run.report().warnings == ()
    assert (result - expected).abs().max() < 1e-4 * expected.abs().max()
    with apply_plan(pipe, plan):
        assert torch.equal(pipe(STEPS), result)


def test_a_backend_that_changes_midway_drops_what_is_stored() -> None:
    pipe = LoopPipeline(*build("QwenImageTransformer2DModel"))
    with apply_plan(pipe, make_plan(pipe, STEPS, [step("#000")])) as run:
        tapped = pipe.scheduler.step

        def changing(*args: Any, **kwargs: Any) -> Any:
            result = tapped(*args, **kwargs)
            if pipe.scheduler._step_index == 2:
                pipe.transformer.set_attention_backend("_native_math")
            return result

        pipe.scheduler.step = changing
        with pytest.warns(UserWarning, match="differed"):
            pipe(STEPS)
        pipe.scheduler.step = tapped
    assert run.report().units[0].seen_predicted == {"cond": 1, "uncond": 1}
