"""Stable Diffusion 3: text-to-image, image-to-image, inpaint, ControlNet, skip-layer guidance."""

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
    embeds,
    euler,
    given,
    heun,
    mask,
    picture,
    transformer,
    unfrozen,
)
from tests.pipelines.vaes import image_vae

_SIZE = 64


def _prompt(seed: int) -> Arguments:
    return {
        "prompt_embeds": embeds(TEXT, 24, seed=seed), "pooled_prompt_embeds": embeds(24, seed=seed),
        "negative_prompt_embeds": embeds(TEXT, 24, seed=seed + 100),
        "negative_pooled_prompt_embeds": embeds(24, seed=seed + 100),
    }  # fmt: skip


def _build(
    pipeline: str,
    vae: bool = True,
    scheduler: Callable[[], Any] = euler,
    channels: int = 4,
    **more: Callable[[], Any],
) -> Callable[[], Any]:
    sizes = {"in_channels": channels, "out_channels": channels, "pos_embed_max_size": 16}

    def build() -> Any:
        return assemble(
            pipeline, scheduler=scheduler(),
            vae=image_vae(channels=channels) if vae else None,
            transformer=transformer("SD3Transformer2DModel", **sizes),
            **{name: make() for name, make in more.items()},
        )  # fmt: skip

    return build


def _controlnet(extra: int = 0) -> Any:
    torch.manual_seed(5)
    config, _ = zoo.BUILDERS["SD3Transformer2DModel"]()
    sizes = {"num_layers": 2, "pos_embed_max_size": 16, "extra_conditioning_channels": extra}
    return unfrozen(diffusers.SD3ControlNetModel(**config | sizes))


def _image() -> Any:
    return picture(_SIZE)


def _mask() -> Any:
    return mask(_SIZE)


def _entry(variant: str, call: Arguments, build: Any = None, kind: str = "", **more: Any) -> Entry:
    pipeline = f"StableDiffusion3{kind}Pipeline"
    fixed = {"height": _SIZE, "width": _SIZE, "guidance_scale": 4.0}
    return Entry(
        pipeline, variant, build or _build(pipeline), _prompt, given(**fixed | call), **more
    )


_PLAIN = _build("StableDiffusion3Pipeline", vae=False)
_NET = _build("StableDiffusion3ControlNetPipeline", controlnet=_controlnet)


def _pag(pipeline: str) -> Callable[[], Any]:
    def build() -> Any:
        return assemble(
            pipeline, scheduler=euler(), vae=image_vae(), pag_applied_layers=["blocks.1"],
            transformer=transformer("SD3Transformer2DModel", pos_embed_max_size=16),
        )  # fmt: skip

    return build


_SKIP = {"skip_guidance_layers": [1, 2], "skip_layer_guidance_start": 0.1}

ENTRIES = (
    _entry("text-to-image", {}, _PLAIN),
    _entry("skip-layer guidance for a while", _SKIP | {"skip_layer_guidance_stop": 0.5}, _PLAIN),
    _entry("no guidance", {"guidance_scale": 1.0}, _PLAIN),
    _entry("perturbed-attention guidance", {}, _pag("StableDiffusion3PAGPipeline"), kind="PAG"),
    _entry("perturbed-attention guidance, image-to-image", {"image": _image, "strength": 0.7},
           _pag("StableDiffusion3PAGImg2ImgPipeline"), kind="PAGImg2Img"),
    _entry("Heun", {}, _build("StableDiffusion3Pipeline", vae=False, scheduler=heun),
           grouped=False, passes=2),
    _entry("Heun, image-to-image", {"image": _image, "strength": 0.7},
           _build("StableDiffusion3Img2ImgPipeline", scheduler=heun), kind="Img2Img",
           grouped=False, passes=2),
    _entry("image-to-image", {"image": _image, "strength": 0.7}, kind="Img2Img"),
    _entry("inpaint", {"image": _image, "mask_image": _mask, "strength": 1.0},
           _build("StableDiffusion3InpaintPipeline", channels=16), kind="Inpaint", partial=True),
    _entry("ControlNet", {"control_image": _image}, _NET, kind="ControlNet"),
    _entry("ControlNet in a window", {"control_image": _image, "control_guidance_start": 0.2,
           "control_guidance_end": 0.6}, _NET, kind="ControlNet"),
    _entry("ControlNet, inpaint", {"control_image": _image, "control_mask": _mask},
           _build("StableDiffusion3ControlNetInpaintingPipeline",
                  controlnet=lambda: _controlnet(extra=1)), kind="ControlNetInpainting"),
)  # fmt: skip
