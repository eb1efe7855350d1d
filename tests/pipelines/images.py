"""Lumina2, Sana, AuraFlow, Chroma, CogView4, HiDream: pipelines for images."""

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
    dpm,
    embeds,
    euler,
    given,
    mask,
    ones,
    picture,
    transformer,
    unfrozen,
)
from tests.pipelines.vaes import dc_vae, image_vae

_SIZE = 64


def _bare(seed: int) -> Arguments:
    return {
        "prompt_embeds": embeds(TEXT, 24, seed=seed),
        "negative_prompt_embeds": embeds(TEXT, 24, seed=seed + 100),
    }


def _masked(seed: int) -> Arguments:
    masks = ("prompt_attention_mask", "negative_prompt_attention_mask")
    return _bare(seed) | {name: ones(TEXT).bool() for name in masks}


def _build(
    pipeline: str,
    model: str,
    scheduler: Callable[[], Any] = euler,
    vae: Callable[[], Any] | None = None,
    sizes: Arguments | None = None,
    **more: Callable[[], Any],
) -> Callable[[], Any]:
    def build() -> Any:
        return assemble(
            pipeline, scheduler=scheduler(), vae=None if vae is None else vae(),
            transformer=transformer(model, **sizes or {}),
            **{name: make() for name, make in more.items()},
        )  # fmt: skip

    return build


def _entry(
    pipeline: str,
    variant: str,
    build: Any,
    prompt: Callable[[int], Arguments],
    call: Arguments | None = None,
    **more: Any,
) -> Entry:
    fixed: Arguments = {"height": _SIZE, "width": _SIZE, "guidance_scale": 3.0}
    return Entry(pipeline, variant, build, prompt, given(**fixed | (call or {})), **more)


def _image() -> Any:
    return picture(_SIZE)


def _mask() -> Any:
    return mask(_SIZE)


# -- Lumina2 and AuraFlow --------------------------------------------------------------------------

_LUMINA = _build("Lumina2Pipeline", "Lumina2Transformer2DModel")
_SIMPLE = (
    _entry("Lumina2Pipeline", "text-to-image", _LUMINA, _masked),
    _entry("Lumina2Pipeline", "guidance starts late", _LUMINA, _masked, {"cfg_trunc_ratio": 0.5}),
    _entry("AuraFlowPipeline", "text-to-image",
           _build("AuraFlowPipeline", "AuraFlowTransformer2DModel"), _masked),
)  # fmt: skip

# -- Sana ------------------------------------------------------------------------------------------

_SANA_SIZE = {
    "use_resolution_binning": False, "height": 128, "width": 128, "negative_prompt": None,
}  # fmt: skip


def _sana(pipeline: str = "SanaPipeline", **more: Any) -> Callable[[], Any]:
    return _build(pipeline, "SanaTransformer2DModel", **{"scheduler": dpm} | more)


def _sana_controlnet() -> Any:
    torch.manual_seed(5)
    config, _ = zoo.BUILDERS["SanaTransformer2DModel"]()
    return unfrozen(diffusers.SanaControlNetModel(**config | {"num_layers": 2}))


def _unguided(seed: int) -> Arguments:
    return {name: v for name, v in _masked(seed).items() if not name.startswith("negative")}


def _scm() -> Any:
    return diffusers.SCMScheduler(sigma_data=0.5)


_SPRINT = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
_SANA = (
    _entry("SanaPipeline", "text-to-image", _sana(), _masked, _SANA_SIZE),
    _entry("SanaPipeline", "text-to-image, Euler", _sana(scheduler=euler), _masked, _SANA_SIZE),
    _entry("SanaControlNetPipeline", "ControlNet",
           _sana("SanaControlNetPipeline", controlnet=_sana_controlnet, vae=dc_vae), _masked,
           _SANA_SIZE | {"control_image": lambda: picture(128)}),
    _entry("SanaPAGPipeline", "perturbed-attention guidance",
           lambda: _build("SanaPAGPipeline", "SanaTransformer2DModel", euler,
                          pag_applied_layers=lambda: "transformer_blocks.1")(),
           _masked, _SANA_SIZE),
    _entry("SanaSprintImg2ImgPipeline", "image-to-image",
           _sana("SanaSprintImg2ImgPipeline", scheduler=_scm, sizes=_SPRINT, vae=dc_vae), _unguided,
           {"use_resolution_binning": False, "height": 128, "width": 128, "strength": 0.9,
            "intermediate_timesteps": None, "image": lambda: picture(128)},
           refused="SCMScheduler draws noise in every step and predicts no velocity"),
    _entry("SanaSprintPipeline", "text-to-image",
           _sana("SanaSprintPipeline", scheduler=_scm, sizes=_SPRINT), _unguided,
           {"use_resolution_binning": False, "height": 128, "width": 128,
            "intermediate_timesteps": None},
           refused="SCMScheduler draws noise in every step and predicts no velocity"),
)  # fmt: skip

# -- Chroma ----------------------------------------------------------------------------------------


def _chroma(pipeline: str, vae: Any = image_vae) -> Callable[[], Any]:
    sizes = {"in_channels": 16, "out_channels": 16}
    return _build(pipeline, "ChromaTransformer2DModel", vae=vae, sizes=sizes)


def _chroma_inpaint() -> Any:
    pipe = _chroma("ChromaInpaintPipeline")()
    # The pipeline reads it, and the model of diffusers 0.42 does not have it.
    pipe.transformer.register_to_config(guidance_embeds=False)
    return pipe


_PAINT = {"image": _image, "mask_image": _mask, "strength": 1.0}
_CHROMA = (
    _entry("ChromaPipeline", "text-to-image", _chroma("ChromaPipeline", vae=None), _masked),
    _entry("ChromaImg2ImgPipeline", "image-to-image", _chroma("ChromaImg2ImgPipeline"), _masked,
           {"image": _image, "strength": 0.7}),
    _entry("ChromaInpaintPipeline", "inpaint", _chroma_inpaint, _masked, _PAINT,
           partial=True),
)  # fmt: skip

# -- CogView4 --------------------------------------------------------------------------------------


def _cogview(pipeline: str, channels: int = 4, vae: Any = None) -> Callable[[], Any]:
    sizes = {"in_channels": channels}
    return _build(pipeline, "CogView4Transformer2DModel", vae=vae, sizes=sizes)


_COGVIEW = (
    _entry("CogView4Pipeline", "text-to-image", _cogview("CogView4Pipeline"), _bare),
    _entry("CogView4ControlPipeline", "Control", _cogview("CogView4ControlPipeline", 8, image_vae),
           _bare, {"control_image": _image}),
)  # fmt: skip

# -- HiDream ---------------------------------------------------------------------------------------


def _hidream_prompt(seed: int) -> Arguments:
    found = {}
    for sign, start in (("", seed), ("negative_", seed + 100)):
        found |= {
            f"{sign}prompt_embeds_t5": embeds(TEXT, 24, seed=start),
            f"{sign}prompt_embeds_llama3": embeds(1, 3, 20, seed=start).expand(2, -1, -1, -1),
            f"{sign}pooled_prompt_embeds": embeds(28, seed=start),
        }
    return found


def _hidream() -> Any:
    pipe = _build("HiDreamImagePipeline", "HiDreamImageTransformer2DModel")()
    # The pipeline scales every size to this one, in latent pixels.
    pipe.default_sample_size = _SIZE // 8
    return pipe


_HIDREAM = (_entry("HiDreamImagePipeline", "text-to-image", _hidream, _hidream_prompt),)

ENTRIES = (*_SIMPLE, *_SANA, *_CHROMA, *_COGVIEW, *_HIDREAM)
