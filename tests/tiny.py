"""Tiny pipelines of real diffusers classes with random weights, for tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

from layercache.reference import call_arguments
from layercache.reference._text import WordEncoder, WordTokenizer
from layercache.reference._vae import PixelUnshuffleVAE


def tiny_transformer(blocks: int = 4, seed: int = 0) -> QwenImageTransformer2DModel:
    """A Qwen-Image transformer of width 32 whose blocks all matter."""
    torch.manual_seed(seed)
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=48,
        out_channels=12,
        num_layers=blocks,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def tiny_pipeline(blocks: int = 4, seed: int = 0) -> QwenImagePipeline:
    """The reference pipeline's parts around a random transformer; equal for equal arguments."""
    transformer = tiny_transformer(blocks, seed)
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=PixelUnshuffleVAE(),
        text_encoder=WordEncoder(),
        tokenizer=WordTokenizer(),
        transformer=transformer,
    )
    pipe.prompt_template_encode = "{}"
    pipe.prompt_template_encode_start_idx = 0
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_arguments(**changes: Any) -> dict[str, Any]:
    """Guidance and size of the reference setting; a seed and a step count where they are named."""
    seed, steps = changes.pop("seed", None), changes.pop("num_inference_steps", None)
    arguments = call_arguments(0 if seed is None else seed)
    if seed is None:
        del arguments["generator"]
    if steps is None:
        del arguments["num_inference_steps"]
    else:
        arguments["num_inference_steps"] = steps
    return arguments | changes
