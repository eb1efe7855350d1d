"""Flux: text-to-image, image-to-image, inpaint, Control, ControlNet, Fill, Kontext; Flux2."""

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
    mask,
    picture,
    pil,
    transformer,
    unfrozen,
)
from tests.pipelines.vaes import flux2_vae, image_vae

_SIZE = 64


def _prompt(seed: int) -> Arguments:
    return {
        "prompt_embeds": embeds(TEXT, 24, seed=seed),
        "pooled_prompt_embeds": embeds(24, seed=seed),
    }


def _guided(seed: int) -> Arguments:
    negative = {f"negative_{name}": value for name, value in _prompt(seed + 100).items()}
    return _prompt(seed) | negative


def _build(
    pipeline: str, channels: int = 16, vae: bool = True, **more: Callable[[], Any]
) -> Callable[[], Any]:
    def build() -> Any:
        return assemble(
            pipeline, scheduler=euler(use_dynamic_shifting=True), vae=image_vae() if vae else None,
            transformer=transformer(
                "FluxTransformer2DModel", in_channels=channels, out_channels=16
            ),
            **{name: make() for name, make in more.items()},
        )  # fmt: skip

    return build


def _controlnet() -> Any:
    torch.manual_seed(5)
    config, _ = zoo.BUILDERS["FluxTransformer2DModel"]()
    sizes = {"num_layers": 1, "num_single_layers": 2, "in_channels": 16}
    return unfrozen(diffusers.FluxControlNetModel(**config | sizes))


def _entry(
    pipeline: str,
    variant: str,
    call: Arguments,
    build: Any = None,
    prompt: Callable[[int], Arguments] = _prompt,
    **more: Any,
) -> Entry:
    size = {"height": _SIZE, "width": _SIZE}
    return Entry(
        pipeline, variant, build or _build(pipeline), prompt, given(**size, **call), **more
    )


def _image() -> Any:
    return picture(_SIZE)


def _mask() -> Any:
    return mask(_SIZE)


def _small(*_: Any, **__: Any) -> Any:
    raise AssertionError("no size is chosen here")


_PAINT = {"image": _image, "mask_image": _mask, "strength": 1.0}
_WINDOW = {"control_guidance_start": 0.2, "control_guidance_end": 0.6}
_KONTEXT = {"image": _image, "max_area": _SIZE**2, "_auto_resize": False}


def _control(pipeline: str) -> Any:
    return _build(pipeline, channels=32)


def _net(pipeline: str) -> Any:
    return _build(pipeline, controlnet=_controlnet)


_FLUX = (
    _entry("FluxPipeline", "text-to-image", {}, _build("FluxPipeline", vae=False)),
    _entry("FluxPipeline", "true guidance", {"true_cfg_scale": 3.0},
           _build("FluxPipeline", vae=False), _guided),
    _entry("FluxImg2ImgPipeline", "image-to-image", {"image": _image, "strength": 0.7}),
    _entry("FluxInpaintPipeline", "inpaint", _PAINT, partial=True),
    _entry("FluxControlPipeline", "Control", {"control_image": _image},
           _control("FluxControlPipeline")),
    _entry("FluxControlImg2ImgPipeline", "Control, image-to-image",
           {"image": _image, "control_image": _image, "strength": 1.0},
           _control("FluxControlImg2ImgPipeline")),
    _entry("FluxControlInpaintPipeline", "Control, inpaint", {"control_image": _image, **_PAINT},
           _control("FluxControlInpaintPipeline"), partial=True),
    _entry("FluxControlNetPipeline", "ControlNet", {"control_image": _image},
           _net("FluxControlNetPipeline")),
    _entry("FluxControlNetPipeline", "ControlNet in a window, true guidance",
           {"control_image": _image, "true_cfg_scale": 3.0, **_WINDOW},
           _net("FluxControlNetPipeline"), _guided),
    _entry("FluxControlNetImg2ImgPipeline", "ControlNet, image-to-image",
           {"image": _image, "control_image": _image, "strength": 1.0},
           _net("FluxControlNetImg2ImgPipeline")),
    _entry("FluxControlNetInpaintPipeline", "ControlNet, inpaint",
           {"control_image": _image, **_PAINT}, _net("FluxControlNetInpaintPipeline"),
           partial=True),
    _entry("FluxFillPipeline", "fill", {"image": _image, "mask_image": _mask},
           _build("FluxFillPipeline", channels=32 + 256)),
    _entry("FluxKontextPipeline", "edit", _KONTEXT),
    _entry("FluxKontextInpaintPipeline", "edit, inpaint", _KONTEXT | {"mask_image": _mask},
           partial=True),
)  # fmt: skip


def _prompt2(seed: int) -> Arguments:
    return {"prompt_embeds": embeds(TEXT, 24, seed=seed)}


def _guided2(seed: int) -> Arguments:
    return _prompt2(seed) | {"negative_prompt_embeds": embeds(TEXT, 24, seed=seed + 100)}


def _build2(pipeline: str, vae: bool = True, **changes: Any) -> Callable[[], Any]:
    def build() -> Any:
        return assemble(
            pipeline, scheduler=euler(use_dynamic_shifting=True), vae=flux2_vae() if vae else None,
            transformer=transformer("Flux2Transformer2DModel", in_channels=16, **changes),
        )  # fmt: skip

    return build


def _image2() -> Any:
    return pil(_SIZE)


_FLUX2 = (
    _entry("Flux2Pipeline", "text-to-image", {}, _build2("Flux2Pipeline"), _prompt2),
    _entry("Flux2Pipeline", "edit", {"image": _image2}, _build2("Flux2Pipeline"), _prompt2),
    _entry("Flux2KleinPipeline", "text-to-image", {"guidance_scale": 3.0},
           _build2("Flux2KleinPipeline"), _guided2),
    _entry("Flux2KleinPipeline", "edit", {"image": _image2, "guidance_scale": 3.0},
           _build2("Flux2KleinPipeline"), _guided2),
    _entry("Flux2KleinInpaintPipeline", "inpaint", {"guidance_scale": 3.0, **_PAINT},
           _build2("Flux2KleinInpaintPipeline"), _guided2, partial=True),
    _entry("Flux2KleinKVPipeline", "edit, keys and values kept", {"image": _image2},
           _build2("Flux2KleinKVPipeline"), _prompt2),
)  # fmt: skip

ENTRIES = (*_FLUX, *_FLUX2)
