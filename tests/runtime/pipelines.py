"""Real diffusers pipelines around the tiny models, called with embeddings and without a decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    WanPipeline,
    ZImagePipeline,
)
from torch import Tensor

from tests.models.zoo import build
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
    transformer, _ = build("FluxTransformer2DModel", in_channels=16)
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
    transformer, _ = build("SD3Transformer2DModel", pos_embed_max_size=16)
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
    transformer, _ = build("WanTransformer3DModel")
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
    transformer, _ = build("ZImageTransformer2DModel")
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


PIPELINES: dict[str, Callable[[], tuple[Any, Call]]] = {
    "QwenImagePipeline": _qwen,
    "FluxPipeline": _flux,
    "StableDiffusion3Pipeline": _sd3,
    "WanPipeline": _wan,
    "ZImagePipeline": _z_image,
}
