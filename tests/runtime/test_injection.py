"""What a model adds between blocks is added once, whether the group is computed or predicted."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from diffusers import FluxControlNetModel, QwenImageControlNetModel, SD3ControlNetModel

from layercache.errors import UnsupportedModelError
from layercache.models import Adapter, BlockList, model_fingerprint, register_adapter
from layercache.models.adapters import _registered
from layercache.runtime import apply_plan
from tests.models.zoo import BATCH, HEAD_DIM, HEADS, WIDTH, build
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
LIST = "transformer_blocks"


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


# -- real ControlNets ------------------------------------------------------------------------------


class Controlled(LoopPipeline):
    """A pipeline whose ControlNet is called before the transformer, at every step and branch."""

    def __init__(self, name: str) -> None:
        super().__init__(*build(name))
        torch.manual_seed(7)
        self.controlnet, self.make = CONTROLNETS[name](self.transformer)
        self.controlnet.eval()
        with torch.no_grad():
            for parameter in self.controlnet.parameters():
                # ControlNets begin as nothing: their last layers are zero.
                if parameter.abs().max() == 0:
                    parameter.normal_(std=0.2)
        self.condition = torch.randn(self.inputs["hidden_states"].shape)
        self.scale = 1.0

    def arguments(self, sigma: float, latent: torch.Tensor | None, branch: str) -> dict[str, Any]:
        arguments = super().arguments(sigma, latent, branch)
        return arguments | self.make(self, arguments) if self.scale else arguments


def _flux_controlnet(transformer: Any) -> tuple[Any, Any]:
    net = FluxControlNetModel.from_transformer(
        transformer, num_layers=2, num_single_layers=2, attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
    )  # fmt: skip

    def make(pipe: Controlled, arguments: dict[str, Any]) -> dict[str, Any]:
        blocks, single = net(
            **arguments, controlnet_cond=pipe.condition, conditioning_scale=pipe.scale,
            return_dict=False,
        )  # fmt: skip
        return {"controlnet_block_samples": blocks, "controlnet_single_block_samples": single}

    return net, make


def _sd3_controlnet(transformer: Any) -> tuple[Any, Any]:
    net = SD3ControlNetModel.from_transformer(
        transformer, num_layers=2, num_extra_conditioning_channels=0
    )

    def make(pipe: Controlled, arguments: dict[str, Any]) -> dict[str, Any]:
        blocks = net(
            **arguments, controlnet_cond=pipe.condition, conditioning_scale=pipe.scale,
            return_dict=False,
        )[0]  # fmt: skip
        return {"block_controlnet_hidden_states": blocks}

    return net, make


def _qwen_controlnet(transformer: Any) -> tuple[Any, Any]:
    net = QwenImageControlNetModel.from_transformer(
        transformer, num_layers=2, attention_head_dim=HEAD_DIM, num_attention_heads=HEADS
    )

    def make(pipe: Controlled, arguments: dict[str, Any]) -> dict[str, Any]:
        blocks = net(
            **arguments, controlnet_cond=pipe.condition, conditioning_scale=pipe.scale,
            return_dict=False,
        )  # fmt: skip
        blocks = blocks[0] if isinstance(blocks, tuple) else blocks
        return {"controlnet_block_samples": blocks}

    return net, make


CONTROLNETS: dict[str, Any] = {
    "FluxTransformer2DModel": _flux_controlnet,
    "SD3Transformer2DModel": _sd3_controlnet,
    "QwenImageTransformer2DModel": _qwen_controlnet,
}


@pytest.mark.parametrize("name", CONTROLNETS)
def test_a_real_controlnet_adds_what_it_adds_once(name: str) -> None:
    pipe = Controlled(name)
    lists = model_fingerprint(pipe.transformer)["block_lists"]
    controlled = pipe(STEPS)
    pipe.scale = 0.0
    assert not torch.allclose(pipe(STEPS), controlled, atol=1e-2)
    pipe.scale = 1.0
    for seed in range(3):
        units = random_units(lists, STEPS, random.Random(seed), with_step=seed == 2)
        expected = SlowRuntime(pipe, STEPS, units).run()
        with apply_plan(pipe, make_plan(pipe, STEPS, units)) as run:
            result = pipe(STEPS)
        assert (result - expected).abs().max() < 1e-5 * expected.abs().max()
        assert run.report().warnings == ()


@pytest.mark.parametrize("name", [*CONTROLNETS, "WanVACETransformer3DModel"])
@torch.no_grad()
def test_another_strength_at_a_skipped_step_has_its_effect_once(name: str) -> None:
    """The residuals are of strength 0; what is added at strength 1 is the model's own addition.

    Skipping every block leaves the input, the additions and the residuals, so the outputs at two
    strengths differ as they would with blocks that did nothing.
    """
    if name.startswith("WanVACE"):
        pipe = LoopPipeline(*build(name))
        strong = dict(pipe.inputs)
        weak = strong | {"control_hidden_states_scale": torch.zeros(2)}
    else:
        pipe = Controlled(name)
        strong = pipe.arguments(0.7, None, "cond")
        weak = {
            key: [torch.zeros_like(t) for t in value] if "controlnet" in key else value
            for key, value in strong.items()
        }
    model: Any = pipe.transformer
    lists = model_fingerprint(model)["block_lists"]
    units = [group(n, 0, count, "#0") for n, count in lists.items()]
    plan = make_plan(pipe, 2, units, branches=1)
    tails: list[torch.Tensor] = []
    # What leaves the last list goes into the model's last norm.
    norm = model.norm_out
    handle = norm.register_forward_pre_hook(lambda module, args: tails.append(args[0].clone()))
    with apply_plan(pipe, plan) as run:
        for arguments in (weak, strong):
            pipe.scheduler.set_timesteps(2)
            for given in (weak, arguments):
                model(**given, return_dict=False)
                latent = torch.zeros(1)
                index = 0 if given is weak and pipe.scheduler._step_index is None else 1
                pipe.scheduler.step(latent, pipe.scheduler.timesteps[index], latent)
        assert run.report().warnings == ()
    handle.remove()
    without, with_addition = tails[1], tails[3]
    torch.testing.assert_close(tails[0], without, rtol=1e-4, atol=1e-5)
    added = torch.zeros_like(without)
    for argument, samples in strong.items():
        if "controlnet" in argument:
            count = lists["single_transformer_blocks" if "single" in argument else LIST]
            # SD3 adds nothing after its last block.
            for index in range(count - 1 if name.startswith("SD3") else count):
                sample = _sample_of(name, samples, index, count)
                added[:, -sample.shape[1] :] += sample
    if name.startswith("WanVACE"):
        added = _vace_hints(model, strong)
    torch.testing.assert_close(with_addition - without, added, rtol=1e-3, atol=1e-4)


def _sample_of(name: str, samples: Any, index: int, count: int) -> torch.Tensor:
    """Which of the samples the model adds after block `index`."""
    if name.startswith("SD3"):
        return samples[int(index / (count / len(samples)))]
    return samples[index // -(-count // len(samples))]


def _vace_hints(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    hints: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(lambda module, args, output: hints.append(output[0]))
        for block in model.vace_blocks
    ]
    model(**inputs, return_dict=False)
    for handle in handles:
        handle.remove()
    scales = inputs["control_hidden_states_scale"]
    return sum(hint * scale for hint, scale in zip(hints, scales, strict=True))


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
