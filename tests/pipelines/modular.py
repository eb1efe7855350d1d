"""Modular pipelines: the denoising blocks of diffusers' own, without encoders and decoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers.modular_pipelines.flux2.modular_blocks_flux2_klein_base as klein
import diffusers.modular_pipelines.ltx.modular_blocks_ltx as ltx
import diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 as sd3
import diffusers.modular_pipelines.wan.modular_blocks_wan as wan
import diffusers.modular_pipelines.wan.modular_blocks_wan22 as wan22
import diffusers.modular_pipelines.z_image.modular_blocks_z_image as z_image
from diffusers import ClassifierFreeGuidance
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxCoreDenoiseStep
from diffusers.modular_pipelines.qwenimage.modular_blocks_qwenimage import QwenImageCoreDenoiseStep

from tests.pipelines.entry import (
    TEXT,
    Arguments,
    Entry,
    embeds,
    euler,
    given,
    ones,
    transformer,
    unipc,
)


def _build(blocks: Any, **components: Callable[[], Any]) -> Callable[[], Any]:
    def build() -> Any:
        pipe = blocks().init_pipeline()
        pipe.update_components(**{name: make() for name, make in components.items()})
        return pipe

    return build


def _net(name: str, seed: int = 0, **sizes: Any) -> Callable[[], Any]:
    return lambda: transformer(name, seed, **sizes)


def _guider() -> Any:
    return ClassifierFreeGuidance(guidance_scale=3.0)


def _window() -> Any:
    return ClassifierFreeGuidance(guidance_scale=3.0, start=0.0, stop=0.6)


def _bare(seed: int) -> Arguments:
    return {
        "prompt_embeds": embeds(TEXT, 24, seed=seed),
        "negative_prompt_embeds": embeds(TEXT, 24, seed=seed + 100),
    }


def _flux_prompt(seed: int) -> Arguments:
    return {
        "prompt_embeds": embeds(TEXT, 24, seed=seed),
        "pooled_prompt_embeds": embeds(24, seed=seed),
    }


def _pooled(seed: int) -> Arguments:
    negative = {f"negative_{name}": value for name, value in _flux_prompt(seed + 100).items()}
    return _flux_prompt(seed) | negative


def _masked(mask: str) -> Callable[[int], Arguments]:
    return lambda seed: _bare(seed) | {mask: ones(TEXT), f"negative_{mask}": ones(TEXT)}


def _listed(seed: int) -> Arguments:
    return {name: list(value) for name, value in _bare(seed).items()}


_IMAGE = {"height": 64, "width": 64}
_VIDEO = {"height": 32, "width": 32, "num_frames": 5}
# Its blocks count on the 16 latent channels of Wan's autoencoder.
_CHANNELS = {"in_channels": 16, "out_channels": 16}
_WAN = _net("WanTransformer3DModel", **_CHANNELS)

ENTRIES = (
    Entry("FluxCoreDenoiseStep", "modular",
          _build(FluxCoreDenoiseStep, scheduler=euler,
                 transformer=_net("FluxTransformer2DModel", in_channels=16)),
          _flux_prompt, given(**_IMAGE)),
    Entry("QwenImageCoreDenoiseStep", "modular",
          _build(QwenImageCoreDenoiseStep, scheduler=euler, guider=_guider,
                 transformer=_net("QwenImageTransformer2DModel", in_channels=64, out_channels=16)),
          _masked("prompt_embeds_mask"), given(**_IMAGE)),
    Entry("WanCoreDenoiseStep", "modular",
          _build(wan.WanCoreDenoiseStep, scheduler=unipc, guider=_guider, transformer=_WAN),
          _bare, given(**_VIDEO)),
    Entry("WanCoreDenoiseStep", "modular, guidance in a window",
          _build(wan.WanCoreDenoiseStep, scheduler=euler, guider=_window, transformer=_WAN),
          _bare, given(**_VIDEO)),
    Entry("Wan22CoreDenoiseStep", "modular, high-noise expert",
          _build(wan22.Wan22CoreDenoiseStep, scheduler=unipc, guider=_guider, guider_2=_guider,
                 transformer=_WAN, transformer_2=_net("WanTransformer3DModel", 1, **_CHANNELS)),
          _bare, given(**_VIDEO)),
    Entry("StableDiffusion3T2ICoreDenoiseStep", "modular",
          _build(sd3.StableDiffusion3T2ICoreDenoiseStep, scheduler=euler, guider=_guider,
                 transformer=_net("SD3Transformer2DModel", pos_embed_max_size=16)),
          _pooled, given(**_IMAGE)),
    Entry("ZImageCoreDenoiseStep", "modular",
          _build(z_image.ZImageCoreDenoiseStep, scheduler=euler, guider=_guider,
                 transformer=_net("ZImageTransformer2DModel")),
          _listed, given(**_IMAGE)),
    Entry("Flux2KleinBaseCoreDenoiseStep", "modular",
          _build(klein.Flux2KleinBaseCoreDenoiseStep, scheduler=euler, guider=_guider,
                 transformer=_net("Flux2Transformer2DModel", in_channels=16)),
          _bare, given(**_IMAGE)),
    Entry("LTXCoreDenoiseStep", "modular",
          _build(ltx.LTXCoreDenoiseStep, scheduler=euler, guider=_guider,
                 transformer=_net("LTXVideoTransformer3DModel")),
          _masked("prompt_attention_mask"), given(**_VIDEO | {"num_frames": 9})),
)  # fmt: skip
