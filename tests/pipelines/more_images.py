"""Krea2, Bria, Ovis and LongCat-Image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.pipelines.entry import (
    TEXT,
    Arguments,
    Entry,
    assemble,
    embeds,
    euler,
    given,
    ones,
    pil,
    transformer,
)
from tests.pipelines.vaes import image_vae, qwen_vae

_CALL = {"height": 64, "width": 64, "guidance_scale": 3.0}


def _prompt(seed: int) -> Arguments:
    return {
        "prompt_embeds": embeds(TEXT, 24, seed=seed),
        "negative_prompt_embeds": embeds(TEXT, 24, seed=seed + 100),
    }


def _krea_prompt(seed: int) -> Arguments:
    return {
        "prompt_embeds": embeds(TEXT, 3, 24, seed=seed), "prompt_embeds_mask": ones(TEXT).bool(),
        "negative_prompt_embeds": embeds(TEXT, 3, 24, seed=seed + 100),
        "negative_prompt_embeds_mask": ones(TEXT).bool(),
    }  # fmt: skip


def _build(
    pipeline: str, model: str, vae: Callable[[], Any] = image_vae, **more: Any
) -> Callable[[], Any]:
    return lambda: assemble(
        pipeline, scheduler=euler(use_dynamic_shifting=True), vae=vae(),
        transformer=transformer(model, **{"in_channels": 16} | more.get("sizes", {})),
        **more.get("components", {}),
    )  # fmt: skip


class NoProcessor:
    """In the place of the vision processor of the text encoder, which is not there."""

    image_processor = None


def _longcat(pipeline: str) -> Callable[[], Any]:
    def build() -> Any:
        sizes = {"in_channels": 64}
        components = {"text_processor": NoProcessor()}
        pipe = _build(
            pipeline, "LongCatImageTransformer2DModel", lambda: image_vae(channels=16),
            sizes=sizes, components=components,
        )()  # fmt: skip

        # In the place of its text encoder, which it does not do without.
        def encode(prompt: list[str], *_: Any, **__: Any) -> torch.Tensor:
            return torch.cat([embeds(TEXT, 24, seed=len(text)) for text in prompt])

        pipe._encode_prompt = encode
        return pipe

    return build


def _longcat_prompt(seed: int) -> Arguments:
    return {"prompt": "o" * seed, "negative_prompt": ""}


def _edit_size(area: int, ratio: float) -> tuple[int, int]:
    return 64, 64


_LONGCAT = {**_CALL, "enable_prompt_rewrite": False}

ENTRIES = (
    Entry("Krea2Pipeline", "text-to-image",
          _build("Krea2Pipeline", "Krea2Transformer2DModel", qwen_vae), _krea_prompt,
          given(**_CALL)),
    Entry("BriaPipeline", "text-to-image", _build("BriaPipeline", "BriaTransformer2DModel"),
          _prompt, given(**_CALL)),
    Entry("OvisImagePipeline", "text-to-image",
          _build("OvisImagePipeline", "OvisImageTransformer2DModel", sizes={"out_channels": 16}),
          _prompt, given(**_CALL, negative_prompt=None)),
    Entry("LongCatImagePipeline", "text-to-image", _longcat("LongCatImagePipeline"),
          _longcat_prompt, given(**_LONGCAT)),
    Entry("LongCatImagePipeline", "guidance not renormalised", _longcat("LongCatImagePipeline"),
          _longcat_prompt, given(**_LONGCAT, enable_cfg_renorm=False)),
    Entry("LongCatImageEditPipeline", "edit", _longcat("LongCatImageEditPipeline"),
          _longcat_prompt, given(image=lambda: pil(64), guidance_scale=3.0),
          patched={"diffusers.pipelines.longcat_image.pipeline_longcat_image_edit"
                   ".calculate_dimensions": _edit_size}),
)  # fmt: skip
