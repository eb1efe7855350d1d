"""What a model adds between blocks is added once, whether the group is computed or predicted."""

from __future__ import annotations

import random

import pytest
import torch

from layercache.errors import UnsupportedModelError
from layercache.models import Adapter, BlockList, model_fingerprint, register_adapter
from layercache.models.adapters import _registered
from layercache.runtime import apply_plan
from tests.models.zoo import BATCH, WIDTH, build
from tests.runtime.harness import (
    LoopPipeline,
    SlowRuntime,
    group,
    make_plan,
    random_units,
)

# Of each model, the arguments that carry a ControlNet's samples, with their sequence length.
INJECTED = {
    "QwenImageTransformer2DModel": {"controlnet_block_samples": 16},
    "FluxTransformer2DModel": {
        "controlnet_block_samples": 16,
        "controlnet_single_block_samples": 16,
    },
    "SD3Transformer2DModel": {"block_controlnet_hidden_states": 16},
    "ChromaTransformer2DModel": {
        "controlnet_block_samples": 16,
        "controlnet_single_block_samples": 16,
    },
    "BriaTransformer2DModel": {
        "controlnet_block_samples": 16,
        "controlnet_single_block_samples": 16,
    },
    "SanaTransformer2DModel": {"controlnet_block_samples": 16},
}
STEPS = 5


def pipeline(name: str) -> LoopPipeline:
    model, inputs = build(name)
    for argument, length in INJECTED[name].items():
        if name.startswith("Bria") and "single" in argument:
            # The single blocks of Bria address text and image positions of one stream.
            length -= inputs["encoder_hidden_states"].shape[1]
        inputs[argument] = [torch.randn(BATCH, length, WIDTH) for _ in range(4)]
    return LoopPipeline(model, inputs)


@pytest.mark.parametrize("name", INJECTED)
def test_nothing_is_added_twice(name: str) -> None:
    pipe = pipeline(name)
    lists = model_fingerprint(pipe.transformer)["block_lists"]
    plain = LoopPipeline(*build(name))
    assert not torch.equal(pipe(1), plain(1))
    for seed in range(3):
        units = random_units(lists, STEPS, random.Random(seed), with_step=False)
        expected = SlowRuntime(pipe, STEPS, units).run()
        with apply_plan(pipe, make_plan(pipe, STEPS, units)) as run:
            result = pipe(STEPS)
        assert (result - expected).abs().max() < 1e-5 * expected.abs().max()
        assert run.report().warnings == ()


def test_undeclared_writing_between_blocks_is_an_error() -> None:
    pipe = pipeline("ChromaTransformer2DModel")
    before = dict(_registered)
    streams = ("hidden_states",)
    register_adapter(
        Adapter(
            "ChromaTransformer2DModel",
            (BlockList("single_transformer_blocks", streams, streams),),
        )
    )
    try:
        plan = make_plan(pipe, 2, [group("single_transformer_blocks", 0, 4, "#0")])
        with (
            apply_plan(pipe, plan),
            pytest.raises(UnsupportedModelError, match="in_place=True"),
        ):
            pipe(2)
    finally:
        _registered.clear()
        _registered.update(before)
