"""Tiny random autoencoders: 4 latent channels, small widths, and the factors of the real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder


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


def hunyuan_video_vae(channels: int = 4) -> Any:
    """`AutoencoderKLHunyuanVideo`, 8 pixels and 4 frames a latent one."""
    return _made(
        lambda: diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=channels, block_out_channels=(8,) * 4, layers_per_block=1,
            norm_num_groups=2, mid_block_add_attention=False,
        )
    )  # fmt: skip


def hunyuan15_vae(channels: int = 4) -> Any:
    """`AutoencoderKLHunyuanVideo15`, 4 pixels and 2 frames a latent one."""
    return _made(
        lambda: diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=channels, block_out_channels=(8, 8), layers_per_block=1,
            spatial_compression_ratio=4, temporal_compression_ratio=2,
            downsample_match_channel=False, upsample_match_channel=False,
        )
    )  # fmt: skip


def hunyuan_image_vae(channels: int = 4) -> Any:
    """`AutoencoderKLHunyuanImage`, 8 pixels a latent pixel."""
    return _made(
        lambda: diffusers.AutoencoderKLHunyuanImage(
            in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=(32,) * 4,
            layers_per_block=1, scaling_factor=0.5, spatial_compression_ratio=8, sample_size=64,
        )
    )  # fmt: skip


def hunyuan_refiner_vae(channels: int = 4) -> Any:
    """`AutoencoderKLHunyuanImageRefiner`, 8 pixels a latent pixel."""
    return _made(
        lambda: diffusers.AutoencoderKLHunyuanImageRefiner(
            latent_channels=channels, block_out_channels=(8,) * 4, layers_per_block=1,
            spatial_compression_ratio=8, temporal_compression_ratio=2,
            downsample_match_channel=False, upsample_match_channel=False,
        )
    )  # fmt: skip


def ltx_vae(channels: int = 4) -> Any:
    """`AutoencoderKLLTXVideo`, 4 pixels and 4 frames a latent one."""
    return _made(
        lambda: diffusers.AutoencoderKLLTXVideo(
            latent_channels=channels, block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8,) * 4, layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False), patch_size=1,
        )
    )  # fmt: skip


def ltx2_vae(channels: int = 4) -> Any:
    """`AutoencoderKLLTX2Video`, 4 pixels and 2 frames a latent one."""
    return _made(
        lambda: diffusers.AutoencoderKLLTX2Video(
            latent_channels=channels, block_out_channels=(8,), decoder_block_out_channels=(8,),
            down_block_types=("LTX2VideoDownBlock3D",), layers_per_block=(1,),
            decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,),
            decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False, False),
            downsample_type=("spatial",), upsample_residual=(False,), upsample_factor=(1,),
            patch_size=2, decoder_causal=False,
        )
    )  # fmt: skip


def audio_vae() -> Any:
    """`AutoencoderKLLTX2Audio`: 2 channels of 2 bins each in the latents."""
    return _made(
        lambda: diffusers.AutoencoderKLLTX2Audio(
            base_channels=4, output_channels=2, ch_mult=(1,), num_res_blocks=1, in_channels=2,
            resolution=32, latent_channels=2, mel_bins=8,
        )
    )  # fmt: skip


def vocoder() -> Any:
    """The vocoder of LTX2 for that autoencoder."""
    return _made(
        lambda: LTX2Vocoder(
            in_channels=16, hidden_channels=8, out_channels=2, upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2], resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]],
            output_sampling_rate=16000,
        )
    )  # fmt: skip
