"""Tiny random autoencoders: 4 latent channels, small widths, and the factors of the real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch


def _made(make: Callable[[], Any]) -> Any:
    torch.manual_seed(3)
    return make().eval()


def image_vae(levels: int = 4, channels: int = 4, **changes: Any) -> Any:
    """`AutoencoderKL`, 2^(levels - 1) pixels a latent pixel."""
    options = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": (8,) * levels, "layers_per_block": 1, "latent_channels": channels,
        "norm_num_groups": 2, "mid_block_add_attention": False, "use_quant_conv": False,
        "use_post_quant_conv": False, "scaling_factor": 0.5, "shift_factor": 0.1,
    }  # fmt: skip
    return _made(lambda: diffusers.AutoencoderKL(**options | changes))


def qwen_vae(channels: int = 4) -> Any:
    """`AutoencoderKLQwenImage`, 8 pixels a latent pixel."""
    return _made(
        lambda: diffusers.AutoencoderKLQwenImage(
            base_dim=4, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False, True, True], latents_mean=[0.1] * channels,
            latents_std=[0.9] * channels,
        )
    )  # fmt: skip


def wan_vae(channels: int = 4) -> Any:
    """`AutoencoderKLWan`, 8 pixels and 4 frames a latent one."""
    return _made(
        lambda: diffusers.AutoencoderKLWan(
            base_dim=4, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False, True, True], latents_mean=[0.1] * channels,
            latents_std=[0.9] * channels,
        )
    )  # fmt: skip


def flux2_vae(channels: int = 4) -> Any:
    """`AutoencoderKLFlux2`, 8 pixels a latent pixel."""
    return _made(
        lambda: diffusers.AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8,) * 4, layers_per_block=1, latent_channels=channels,
            norm_num_groups=2, mid_block_add_attention=False, use_quant_conv=False,
            use_post_quant_conv=False,
        )
    )  # fmt: skip


def dc_vae(channels: int = 4) -> Any:
    """`AutoencoderDC`, 32 pixels a latent pixel."""
    return _made(
        lambda: diffusers.AutoencoderDC(
            in_channels=3, latent_channels=channels, attention_head_dim=2,
            encoder_block_types="ResBlock", decoder_block_types="ResBlock",
            encoder_block_out_channels=(8,) * 6, decoder_block_out_channels=(8,) * 6,
            encoder_layers_per_block=(1,) * 6, decoder_layers_per_block=(1,) * 6,
            encoder_qkv_multiscales=((),) * 6, decoder_qkv_multiscales=((),) * 6,
            downsample_block_type="conv", upsample_block_type="interpolate",
            decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.5,
        )
    )  # fmt: skip
