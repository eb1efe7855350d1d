"""Training batches: cached latents, captions, noise levels and noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import FluxPipeline
from torch import Tensor
from transformers import CLIPTokenizer, T5Tokenizer

from bench.training.scenes import Scene, describe
from bench.training.text import CAPTION_TOKENS, CLIP_TOKENS, token_ids

BATCH_STREAM = 14
CAPTION_DROPOUT = 0.1
SIGMA_SHIFT = 2.0
LONG_EVERY, LONG_SHARE, LONG_TOKENS = 20, 0.125, 512
"""Every 20th batch is a smaller one with captions padded to 512 tokens, the pipeline's default, so
that the model learns to pay no attention to padding."""


@dataclass(frozen=True)
class Batch:
    """One batch: packed latents and noise (B, S, C), token ids (B, L), sigmas (B,)."""

    latents: Tensor
    noise: Tensor
    sigmas: Tensor
    t5_ids: Tensor
    clip_ids: Tensor
    padded_long: bool


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) to FLUX's tokens (B, h w / 4, 4 C)."""
    packed: Tensor = FluxPipeline._pack_latents(latents, *latents.shape)
    return packed


class Batches:
    """Batch `index` of process `rank` is a function of (scenes, seed, rank, index) alone."""

    def __init__(
        self,
        latents: Tensor,
        scenes: list[Scene],
        tokenizers: tuple[CLIPTokenizer, T5Tokenizer],
        seed: int,
        size: int,
        openness: float = 0.25,
        dropout: float = CAPTION_DROPOUT,
        long_every: int = LONG_EVERY,
        rank: int = 0,
    ) -> None:
        self.latents, self.scenes, self.tokenizers = latents, scenes, tokenizers
        self.seed, self.size, self.openness, self.dropout = seed, size, openness, dropout
        self.long_every, self.rank = long_every, rank

    def __getitem__(self, index: int) -> Batch:
        rng = np.random.default_rng([BATCH_STREAM, self.seed, self.rank, index])
        padded_long = self.long_every > 0 and index % self.long_every == self.long_every - 1
        size = max(1, int(self.size * LONG_SHARE)) if padded_long else self.size
        chosen = rng.integers(len(self.scenes), size=size)
        captions = [
            "" if rng.random() < self.dropout else describe(self.scenes[i], rng, self.openness)
            for i in chosen
        ]
        latents = pack(self.latents[torch.from_numpy(chosen)].float())
        u = 1 / (1 + np.exp(-rng.standard_normal(size)))
        sigmas = SIGMA_SHIFT * u / (1 + (SIGMA_SHIFT - 1) * u)
        clip, t5 = self.tokenizers
        return Batch(
            latents=latents,
            noise=torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32)),
            sigmas=torch.from_numpy(sigmas).float(),
            t5_ids=token_ids(t5, captions, LONG_TOKENS if padded_long else CAPTION_TOKENS),
            clip_ids=token_ids(clip, captions, CLIP_TOKENS),
            padded_long=padded_long,
        )
