"""Pipelines whose models have no adapter: whole steps only. Transformers, and UNets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch

from tests.models import zoo
from tests.pipelines.entry import (
    TEXT,
    Arguments,
    Entry,
    assemble,
    dpm,
    embeds,
    euler,
    given,
    ones,
    unfrozen,
    unipc,
)
from tests.pipelines.vaes import image_vae


def _made(name: str, **config: Any) -> Any:
    torch.manual_seed(0)
    return unfrozen(getattr(diffusers, name)(**config))


def _like(model: str, name: str, **changes: Any) -> Callable[[], Any]:
    """A model of another class with the sizes of one of the zoo."""
    return lambda: _made(name, **zoo.BUILDERS[model]()[0] | changes)


def _unet(**changes: Any) -> Callable[[], Any]:
    config = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (32, 64),
        "cross_attention_dim": 24, "attention_head_dim": 8, "norm_num_groups": 8,
    }  # fmt: skip
    return lambda: _made("UNet2DConditionModel", **config | changes)


def _build(
    pipeline: str, denoiser: Callable[[], Any], scheduler: Callable[[], Any], **more: Any
) -> Callable[[], Any]:
    place = _component(pipeline)
    return lambda: assemble(pipeline, scheduler=scheduler(), **{place: denoiser()}, **more)


def _component(pipeline: str) -> str:
    return "unet" if pipeline.startswith("StableDiffusion") else "transformer"


class NoProcessor:
    """In the place of the processor of the text encoder, which is not there."""

    @property
    def tokenizer(self) -> NoProcessor:
        return self

    def encode(self, text: str) -> list[int]:
        return [0]

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        return [[0]]


def _prompt(seed: int) -> Arguments:
    return {
        "prompt_embeds": embeds(TEXT, 24, seed=seed),
        "negative_prompt_embeds": embeds(TEXT, 24, seed=seed + 100),
    }


def _masked(seed: int) -> Arguments:
    masks = {"prompt_attention_mask": ones(TEXT), "negative_prompt_attention_mask": ones(TEXT)}
    return _prompt(seed) | masks


def _pooled(seed: int) -> Arguments:
    return _prompt(seed) | {
        "pooled_prompt_embeds": embeds(24, seed=seed + 1),
        "negative_pooled_prompt_embeds": embeds(24, seed=seed + 101),
    }


def _flow(make: Callable[..., Any]) -> Callable[[], Any]:
    return lambda: make(steps_offset=1)


_QWEN21 = {
    "in_channels": 64, "out_channels": 64, "num_layers": 3, "attention_head_dim": 16,
    "num_attention_heads": 2, "context_in_dim": 24, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
_XL = _unet(
    addition_embed_type="text_time", addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=24 + 6 * 8,
)  # fmt: skip
_VIDEO = {"height": 32, "width": 32, "guidance_scale": 4.0}


def _entry(pipeline: str, variant: str, build: Any, prompt: Any, **call: Any) -> Entry:
    return Entry(
        pipeline, variant, build, prompt, given(**call), component=_component(pipeline),
        grouped=False,
    )  # fmt: skip


ENTRIES = (
    _entry("QwenImage21Pipeline", "text-to-image, with the text's keys and values kept",
           _build("QwenImage21Pipeline", lambda: _made("QwenImage21Transformer2DModel", **_QWEN21),
                  euler, processor=NoProcessor()),
           _prompt, height=64, width=64, true_cfg_scale=3.0),
    _entry("SanaVideoPipeline", "text-to-video",
           _build("SanaVideoPipeline",
                  _like("SanaTransformer2DModel", "SanaVideoTransformer3DModel",
                        attention_head_dim=16), dpm),
           _masked, negative_prompt=None, frames=5, use_resolution_binning=False, **_VIDEO),
    _entry("SkyReelsV2Pipeline", "text-to-video",
           _build("SkyReelsV2Pipeline",
                  _like("WanTransformer3DModel", "SkyReelsV2Transformer3DModel"), unipc),
           _prompt, num_frames=5, **_VIDEO),
    _entry("StableDiffusionPipeline", "a UNet that predicts a velocity",
           _build("StableDiffusionPipeline", _unet(), _flow(unipc), vae=image_vae(),
                  requires_safety_checker=False),
           _prompt, height=16, width=16, guidance_scale=3.0),
    _entry("StableDiffusionXLPipeline", "a UNet that predicts a velocity",
           _build("StableDiffusionXLPipeline", _XL, _flow(dpm)),
           _pooled, height=64, width=64, guidance_scale=3.0),
)  # fmt: skip
