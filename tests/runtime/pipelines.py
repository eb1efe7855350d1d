"""Real diffusers pipelines around the tiny models, called with embeddings and without a decoder."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    Lumina2Pipeline,
    StableDiffusion3Pipeline,
    WanPipeline,
    ZImagePipeline,
)
from torch import Tensor

from layercache.models import model_fingerprint
from layercache.models.stepping import sigmas_of
from layercache.plan import Plan
from tests.models import zoo
from tests.runtime.harness import make_plan, random_units
from tests.tiny import tiny_arguments, tiny_pipeline

STEPS = 5
PROMPT = "a large red circle"
Call = Callable[..., Tensor]


def _embeds(images: int, *shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, *shape, generator=generator).repeat(images, *[1] * len(shape))


def _seeds(images: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(images)]


def _qwen() -> tuple[Any, Call]:
    pipe = tiny_pipeline()

    def call(size: int = 32, images: int = 1, guidance: float = 4.0, **more: Any) -> Tensor:
        arguments = tiny_arguments(
            num_inference_steps=STEPS, height=size, width=size, true_cfg_scale=guidance,
            generator=_seeds(images), output_type="latent", negative_prompt=[""] * images,
        )  # fmt: skip
        return pipe([PROMPT] * images, **(arguments | more)).images

    return pipe, call


def _flux() -> tuple[Any, Call]:
    # The pipeline packs 2x2 latent pixels, so 16 channels are 4 in the latents.
    transformer, _ = zoo.build("FluxTransformer2DModel", in_channels=16)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=None, text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None, transformer=transformer,
    )  # fmt: skip

    def call(size: int = 32, images: int = 1, guidance: float = 4.0, **more: Any) -> Tensor:
        return pipe(
            prompt_embeds=_embeds(images, 5, 24), pooled_prompt_embeds=_embeds(images, 24),
            negative_prompt_embeds=_embeds(images, 5, 24, seed=2),
            negative_pooled_prompt_embeds=_embeds(images, 24, seed=2), true_cfg_scale=guidance,
            height=2 * size, width=2 * size, num_inference_steps=STEPS, generator=_seeds(images),
            output_type="latent", **more,
        ).images  # fmt: skip

    return pipe, call


def _sd3() -> tuple[Any, Call]:
    transformer, _ = zoo.build("SD3Transformer2DModel", pos_embed_max_size=16)
    pipe = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=None, text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None,
        tokenizer_3=None, transformer=transformer,
    )  # fmt: skip

    def call(size: int = 32, images: int = 1, guidance: float = 4.0, **more: Any) -> Tensor:
        return pipe(
            prompt_embeds=_embeds(images, 5, 24), pooled_prompt_embeds=_embeds(images, 24),
            negative_prompt_embeds=_embeds(images, 5, 24, seed=2),
            negative_pooled_prompt_embeds=_embeds(images, 24, seed=2), guidance_scale=guidance,
            height=2 * size, width=2 * size, num_inference_steps=STEPS, generator=_seeds(images),
            output_type="latent", **more,
        ).images  # fmt: skip

    return pipe, call


def _wan() -> tuple[Any, Call]:
    transformer, _ = zoo.build("WanTransformer3DModel")
    pipe = WanPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=None, text_encoder=None,
        tokenizer=None, transformer=transformer,
    )  # fmt: skip

    def call(size: int = 32, images: int = 1, guidance: float = 4.0, **more: Any) -> Tensor:
        return pipe(
            prompt_embeds=_embeds(images, 5, 24), guidance_scale=guidance,
            negative_prompt_embeds=_embeds(images, 5, 24, seed=2), height=size, width=size,
            num_frames=5, num_inference_steps=STEPS, generator=_seeds(images),
            output_type="latent", **more,
        ).frames  # fmt: skip

    return pipe, call


def _z_image() -> tuple[Any, Call]:
    transformer, _ = zoo.build("ZImageTransformer2DModel")
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=None, text_encoder=None,
        tokenizer=None, transformer=transformer,
    )  # fmt: skip

    def call(size: int = 32, images: int = 1, guidance: float = 4.0, **more: Any) -> Tensor:
        return pipe(
            prompt_embeds=list(_embeds(images, 5, 24)),
            negative_prompt_embeds=list(_embeds(images, 5, 24, seed=2)), guidance_scale=guidance,
            height=2 * size, width=2 * size, num_inference_steps=STEPS, generator=_seeds(images),
            output_type="latent", **more,
        ).images  # fmt: skip

    return pipe, call


def _lumina2() -> tuple[Any, Call]:
    transformer, _ = zoo.build("Lumina2Transformer2DModel")
    pipe = Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=None, text_encoder=None,
        tokenizer=None, transformer=transformer,
    )  # fmt: skip

    def call(size: int = 32, images: int = 1, guidance: float = 4.0, **more: Any) -> Tensor:
        mask = torch.ones(images, 5, dtype=torch.bool)
        return pipe(
            prompt_embeds=_embeds(images, 5, 24), prompt_attention_mask=mask,
            negative_prompt_embeds=_embeds(images, 5, 24, seed=2),
            negative_prompt_attention_mask=mask, guidance_scale=guidance,
            height=2 * size, width=2 * size, num_inference_steps=STEPS, generator=_seeds(images),
            output_type="latent", **more,
        ).images  # fmt: skip

    return pipe, call


def wan_with_two_experts(boundary: float = 0.7) -> tuple[Any, Call]:
    """Wan 2.2: one transformer for the high noise levels, another for the low ones."""
    pipe, call = _wan()
    pipe.transformer_2, _ = zoo.build("WanTransformer3DModel", seed=1)
    pipe.register_to_config(boundary_ratio=boundary)
    return pipe, call


PIPELINES: dict[str, Callable[[], tuple[Any, Call]]] = {
    "QwenImagePipeline": _qwen,
    "FluxPipeline": _flux,
    "StableDiffusion3Pipeline": _sd3,
    "WanPipeline": _wan,
    "ZImagePipeline": _z_image,
    "Lumina2Pipeline": _lumina2,
}


def build(name: str) -> tuple[Any, Call]:
    """The pipeline, quiet, and a function that calls it."""
    return quiet(*PIPELINES[name]())


def quiet(pipe: Any, call: Call) -> tuple[Any, Call]:
    """Without progress bars."""
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


def plan_for(pipe: Any, call: Call, units: Any) -> Plan:
    """A plan on the noise levels that the pipeline really uses, which it may set by itself."""
    calls = 0

    def counting(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handle = pipe.transformer.register_forward_pre_hook(counting)
    call()
    handle.remove()
    branches = max(1, round(calls / STEPS))
    return make_plan(pipe, STEPS, units, sigmas=sigmas_of(pipe.scheduler), branches=branches)


def planned(pipe: Any, call: Call, seed: int = 0) -> Plan:
    """A random plan on them."""
    lists = model_fingerprint(pipe.transformer)["block_lists"]
    return plan_for(pipe, call, random_units(lists, STEPS, random.Random(seed)))
