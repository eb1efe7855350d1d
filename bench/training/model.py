"""The transformer, its text encoders, and the loss that trains them together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

from bench.training.data import Batch
from bench.training.text import (
    CLIP,
    T5,
    build_text_encoders,
    clip_tokenizer,
    t5_tokenizer,
)

ARCHITECTURE: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 32,
    "num_layers": 4,
    "num_single_layers": 8,
    "attention_head_dim": 32,
    "num_attention_heads": 6,
    "joint_attention_dim": T5["d_model"],
    "pooled_projection_dim": CLIP["hidden_size"],
    "guidance_embeds": False,
    "axes_dims_rope": (8, 12, 12),
}


def build_transformer(**changes: Any) -> FluxTransformer2DModel:
    """The transformer with adaLN-zero initialisation: every block starts as the identity."""
    model = FluxTransformer2DModel(**(ARCHITECTURE | changes))
    layers = [model.proj_out]
    for block in model.transformer_blocks:
        layers += [block.norm1.linear, block.norm1_context.linear]
    layers += [block.norm.linear for block in model.single_transformer_blocks]
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


class Painting(nn.Module):
    """What is trained: a transformer and the two text encoders that speak to it."""

    def __init__(self, words: Sequence[str], **changes: Any) -> None:
        super().__init__()
        self.tokenizers = clip_tokenizer(words), t5_tokenizer(words)
        self.transformer = build_transformer(**changes)
        encoders = build_text_encoders(*self.tokenizers)
        self.clip: CLIPTextModel = encoders[0]
        self.t5: T5EncoderModel = encoders[1]

    def velocity(self, latents: Tensor, sigmas: Tensor, t5_ids: Tensor, clip_ids: Tensor) -> Tensor:
        """Velocity (B, S, C) of packed noisy latents, as the pipeline would ask for it."""
        side = int(latents.shape[1] ** 0.5)
        image_ids = FluxPipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)
        velocity: Tensor = self.transformer(
            latents,
            encoder_hidden_states=self.t5(t5_ids)[0],
            pooled_projections=self.clip(clip_ids).pooler_output,
            timestep=sigmas,
            img_ids=image_ids,
            txt_ids=torch.zeros(t5_ids.shape[1], 3),
            return_dict=False,
        )[0]
        return velocity

    def loss(self, batch: Batch) -> Tensor:
        """Mean squared error of the velocity noise - x at z = (1 - sigma) x + sigma noise."""
        s = batch.sigmas[:, None, None]
        noisy = (1 - s) * batch.latents + s * batch.noise
        with torch.autocast("cpu", dtype=torch.bfloat16):
            velocity = self.velocity(noisy, batch.sigmas, batch.t5_ids, batch.clip_ids)
        return (velocity.float() - (batch.noise - batch.latents)).pow(2).mean()


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon optimises it: matrices inside blocks, but for those of the modulation."""
    return parameter.ndim == 2 and "transformer_blocks" in name and ".norm" not in name
