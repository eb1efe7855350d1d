"""A lossless stand-in for the image autoencoder: pixels, regrouped into channels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

PIXEL_STD = 0.5


class PixelUnshuffleVAE(ModelMixin, ConfigMixin):
    """`AutoencoderKLQwenImage`'s interface over `pixel_unshuffle`; it has no weights.

    Latents have shape (batch, 12, 1, height / 2, width / 2) and about unit variance.
    """

    @register_to_config
    def __init__(
        self,
        z_dim: int = 12,
        latents_mean: tuple[float, ...] = (0.0,) * 12,
        latents_std: tuple[float, ...] = (PIXEL_STD,) * 12,
    ) -> None:
        super().__init__()
        # One spatial halving: QwenImagePipeline derives its scale factor from this list's length.
        self.temperal_downsample = [False]
        # diffusers reads a model's device and dtype off its tensors, so there has to be one.
        self.register_buffer("anchor", torch.zeros(1), persistent=False)

    def encode(self, images: Tensor) -> Tensor:
        """(batch, 3, H, W) in [-1, 1] to standardised latents (batch, 12, 1, H/2, W/2)."""
        return F.pixel_unshuffle(images, 2).unsqueeze(2) / PIXEL_STD

    def decode(self, latents: Tensor, return_dict: bool = True) -> Any:
        """Latents in pixel units (batch, 12, 1, h, w) to images (batch, 3, 1, 2h, 2w)."""
        images = F.pixel_shuffle(latents.squeeze(2), 2).unsqueeze(2)
        return SimpleNamespace(sample=images) if return_dict else (images,)
