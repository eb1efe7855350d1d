"""Z-Image: text-to-image, guidance that ends midway, image-to-image, inpaint, ControlNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch

from tests.pipelines.entry import (
    TEXT,
    Arguments,
    Entry,
    assemble,
    embeds,
    euler,
    given,
    mask,
    picture,
    transformer,
    unfrozen,
)
from tests.pipelines.vaes import image_vae

_SIZE = 64


def _prompt(seed: int) -> Arguments:
    return {
        "prompt_embeds": list(embeds(TEXT, 24, seed=seed)),
        "negative_prompt_embeds": list(embeds(TEXT, 24, seed=seed + 100)),
    }


def _build(pipeline: str, vae: bool = True, **more: Callable[[], Any]) -> Callable[[], Any]:
    def build() -> Any:
        net = transformer("ZImageTransformer2DModel")
        return assemble(
            pipeline, scheduler=euler(), vae=image_vae() if vae else None, transformer=net,
            **{name: make() for name, make in more.items()},
        )  # fmt: skip

    return build


def _controlnet(channels: int = 4) -> Any:
    torch.manual_seed(5)
    return unfrozen(
        diffusers.ZImageControlNetModel(
            control_layers_places=[0, 2], control_refiner_layers_places=[0],
            control_in_dim=channels, dim=32, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        )
    )  # fmt: skip


def _image() -> Any:
    return picture(_SIZE)


def _mask() -> Any:
    return mask(_SIZE)


def _entry(variant: str, call: Arguments, build: Any = None, kind: str = "", **more: Any) -> Entry:
    pipeline = f"ZImage{kind}Pipeline"
    fixed = {"height": _SIZE, "width": _SIZE, "guidance_scale": 3.0}
    return Entry(
        pipeline, variant, build or _build(pipeline), _prompt, given(**fixed | call), **more
    )


_PLAIN = _build("ZImagePipeline", vae=False)

ENTRIES = (
    _entry("text-to-image", {}, _PLAIN),
    _entry("guidance ends midway", {"cfg_truncation": 0.6}, _PLAIN),
    _entry("guidance normalised", {"cfg_normalization": True}, _PLAIN),
    _entry("image-to-image", {"image": _image, "strength": 0.7}, kind="Img2Img"),
    _entry("inpaint", {"image": _image, "mask_image": _mask, "strength": 1.0}, kind="Inpaint",
           partial=True),
    _entry("ControlNet", {"control_image": _image},
           _build("ZImageControlNetPipeline", controlnet=_controlnet), kind="ControlNet"),
    _entry("ControlNet, guidance ends midway", {"control_image": _image, "cfg_truncation": 0.6},
           _build("ZImageControlNetPipeline", controlnet=_controlnet), kind="ControlNet"),
    _entry("ControlNet, inpaint",
           {"control_image": _image, "image": _image, "mask_image": _mask},
           _build("ZImageControlNetInpaintPipeline", controlnet=lambda: _controlnet(9)),
           kind="ControlNetInpaint"),
)  # fmt: skip
