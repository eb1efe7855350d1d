"""diffusers' modular pipelines around the tiny models: denoising blocks alone, on embeddings."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxCoreDenoiseStep
from diffusers.modular_pipelines.qwenimage.modular_blocks_qwenimage import QwenImageCoreDenoiseStep
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep
from torch import Tensor

from layercache.models.stepping import sigmas_of
from tests.models import zoo
from tests.runtime.harness import make_plan, step

STEPS = 5


def _noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def _flux() -> tuple[Any, dict[str, Any]]:
    net, _ = zoo.build("FluxTransformer2DModel", in_channels=16)
    given = {"pooled_prompt_embeds": _noise(24, seed=3), "height": 64, "width": 64}
    return (FluxCoreDenoiseStep(), net), given


def _qwen() -> tuple[Any, dict[str, Any]]:
    net, _ = zoo.build("QwenImageTransformer2DModel")
    mask = torch.ones(1, 5, dtype=torch.int64)
    given = {
        "negative_prompt_embeds": _noise(5, 24, seed=2), "prompt_embeds_mask": mask,
        "negative_prompt_embeds_mask": mask, "height": 64, "width": 64,
    }  # fmt: skip
    return (QwenImageCoreDenoiseStep(), net), given


def _wan() -> tuple[Any, dict[str, Any]]:
    net, _ = zoo.build("WanTransformer3DModel", in_channels=16, out_channels=16)
    given = {
        "negative_prompt_embeds": _noise(5, 24, seed=2), "height": 32, "width": 32, "num_frames": 5
    }  # fmt: skip
    return (WanCoreDenoiseStep(), net), given


MODULAR: dict[str, Callable[[], Any]] = {"flux": _flux, "qwenimage": _qwen, "wan": _wan}
Call = Callable[..., Tensor]


def build(name: str, net: Any = None) -> tuple[Any, Call]:
    """A modular pipeline, around `net` where one is given, and a function that calls it."""
    (blocks, own), given = MODULAR[name]()
    with contextlib.redirect_stderr(io.StringIO()):
        pipe = blocks.init_pipeline()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.update_components(transformer=own if net is None else net, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)

    def call(seed: int = 0, on: Any = pipe, steps: int = STEPS, **more: Any) -> Tensor:
        arguments = {
            "prompt_embeds": _noise(5, 24, seed=1), "num_inference_steps": steps,
            "generator": torch.Generator().manual_seed(seed), "output": "latents",
        } | given  # fmt: skip
        return on(**(arguments | more))

    return pipe, call


def loop_block(pipe: Any) -> Any:
    """The block that is called after every call of the transformer."""
    (loop,) = (
        block for block in pipe._blocks.sub_blocks.values() if hasattr(block, "progress_bar")
    )
    return list(loop.sub_blocks.values())[-1]


def plan_of(pipe: Any, call: Any, **changes: Any) -> Any:
    calls: list[int] = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    call()
    handle.remove()
    fields = {"sigmas": sigmas_of(pipe.scheduler), "branches": len(calls) // STEPS}
    return make_plan(pipe, STEPS, [step("##0#0")], **(fields | changes))
