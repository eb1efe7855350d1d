"""QwenImage: text-to-image, image-to-image, inpaint, edit, ControlNet."""

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
    ones,
    picture,
    pil,
    transformer,
    unfrozen,
)
from tests.pipelines.vaes import qwen_vae

_MODULE = "diffusers.pipelines.qwenimage.pipeline_qwenimage"


def _prompt(seed: int) -> Arguments:
    return {
        "prompt_embeds": embeds(TEXT, 24, seed=seed), "prompt_embeds_mask": ones(TEXT),
        "negative_prompt_embeds": embeds(TEXT, 24, seed=seed + 100),
        "negative_prompt_embeds_mask": ones(TEXT),
    }  # fmt: skip


def _build(pipeline: str, vae: bool = True, **more: Callable[[], Any]) -> Callable[[], Any]:
    def build() -> Any:
        return assemble(
            pipeline, scheduler=euler(use_dynamic_shifting=True),
            transformer=transformer("QwenImageTransformer2DModel"),
            vae=qwen_vae() if vae else None, **{name: make() for name, make in more.items()},
        )  # fmt: skip

    return build


def _controlnet(extra: int = 0) -> Any:
    torch.manual_seed(5)
    config, _ = zoo.BUILDERS["QwenImageTransformer2DModel"]()
    return unfrozen(
        diffusers.QwenImageControlNetModel(
            **config | {"num_layers": 2, "extra_condition_channels": extra}
        )
    )


def _small(area: int, ratio: float) -> tuple[int, int, None]:
    return 32, 32, None


def _small_pair(area: int, ratio: float) -> tuple[int, int]:
    return 32, 32


def _call(**more: Any) -> Callable[[], Arguments]:
    return given(true_cfg_scale=3.0, height=32, width=32, **more)


def _entry(
    pipeline: str, variant: str, call: Callable[[], Arguments], build: Any = None, **more: Any
) -> Entry:
    return Entry(pipeline, variant, build or _build(pipeline), _prompt, call, **more)


def _layered() -> Any:
    return assemble(
        "QwenImageLayeredPipeline", scheduler=euler(use_dynamic_shifting=True), vae=qwen_vae(),
        transformer=transformer("QwenImageTransformer2DModel", use_additional_t_cond=True,
                                use_layer3d_rope=True),
        # Only its dtype is read, since embeddings are given.
        text_encoder=qwen_vae(),
    )  # fmt: skip


ENTRIES = (
    _entry("QwenImagePipeline", "text-to-image", _call(), _build("QwenImagePipeline", vae=False)),
    _entry("QwenImageImg2ImgPipeline", "image-to-image", _call(image=picture, strength=1.0)),
    _entry("QwenImageImg2ImgPipeline", "image-to-image, strength 0.7",
           _call(image=picture, strength=0.7)),
    _entry("QwenImageInpaintPipeline", "inpaint",
           _call(image=picture, mask_image=mask, strength=1.0), partial=True),
    _entry("QwenImageEditPipeline", "edit", _call(image=pil),
           patched={f"{_MODULE}_edit.calculate_dimensions": _small}),
    _entry("QwenImageEditInpaintPipeline", "edit, inpaint",
           _call(image=pil, mask_image=mask, strength=1.0), partial=True,
           patched={f"{_MODULE}_edit_inpaint.calculate_dimensions": _small}),
    _entry("QwenImageEditPlusPipeline", "edit, two images",
           _call(image=lambda: [pil(), pil(seed=8)]),
           patched={f"{_MODULE}_edit_plus.calculate_dimensions": _small_pair}),
    _entry("QwenImageLayeredPipeline", "image to layers",
           given(true_cfg_scale=3.0, image=pil, layers=2, prompt="a"),
           _layered, patched={f"{_MODULE}_layered.calculate_dimensions": _small_pair}),
    _entry("QwenImageControlNetPipeline", "ControlNet", _call(control_image=picture),
           _build("QwenImageControlNetPipeline", controlnet=_controlnet)),
    _entry("QwenImageControlNetPipeline", "ControlNet in a window",
           _call(control_image=picture, control_guidance_start=0.2, control_guidance_end=0.6),
           _build("QwenImageControlNetPipeline", controlnet=_controlnet)),
    _entry("QwenImageControlNetInpaintPipeline", "ControlNet, inpaint",
           _call(control_image=picture, control_mask=mask),
           _build("QwenImageControlNetInpaintPipeline", controlnet=lambda: _controlnet(extra=4))),
)  # fmt: skip
