"""Wan: text-, image- and video-to-video, two experts, VACE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tests.pipelines.entry import (
    TEXT,
    Arguments,
    Entry,
    assemble,
    dpm,
    embeds,
    euler,
    given,
    pil,
    transformer,
    unipc,
)
from tests.pipelines.vaes import wan_vae

_FRAMES = 5


def _prompt(seed: int) -> Arguments:
    return {
        "prompt_embeds": embeds(TEXT, 24, seed=seed),
        "negative_prompt_embeds": embeds(TEXT, 24, seed=seed + 100),
    }


def _build(
    pipeline: str,
    channels: int = 4,
    vae: bool = True,
    scheduler: Callable[[], Any] = euler,
    model: str = "WanTransformer3DModel",
    experts: bool = False,
    **more: Any,
) -> Callable[[], Any]:
    sizes = {"in_channels": channels}
    if "VACE" in model:
        # 4 + 4 channels of the two halves of the video, 64 of the mask.
        sizes |= {"vace_in_channels": 8 + 64}

    def build() -> Any:
        second = {"boundary_ratio": 0.7} if experts else {}
        if experts:
            second["transformer_2"] = transformer(model, seed=1, **sizes)
        return assemble(
            pipeline, scheduler=scheduler(), vae=wan_vae() if vae else None,
            transformer=transformer(model, **sizes), **second, **more,
        )  # fmt: skip

    return build


def _video() -> list[Any]:
    return [pil(seed=seed) for seed in range(_FRAMES)]


def _masks() -> list[Any]:
    return [pil(seed=seed).convert("L").point(lambda v: 255 * (v > 128)) for seed in range(_FRAMES)]


def _image_embeds() -> Tensor:
    return embeds(3, 12, seed=4)


def _entry(variant: str, call: Arguments, build: Any, kind: str = "", **more: Any) -> Entry:
    fixed: Arguments = {"height": 32, "width": 32, "guidance_scale": 3.0}
    if kind != "VideoToVideo":
        fixed["num_frames"] = _FRAMES
    return Entry(f"Wan{kind}Pipeline", variant, build, _prompt, given(**fixed | call), **more)


def _plain(**more: Any) -> Callable[[], Any]:
    return _build("WanPipeline", vae=False, **more)


def _i2v(**more: Any) -> Callable[[], Any]:
    # Latents, 4 channels of the frame mask, and the encoded first frame.
    return _build("WanImageToVideoPipeline", channels=4 + 4 + 4, **more)


def _vace(**more: Any) -> Callable[[], Any]:
    return _build("WanVACEPipeline", model="WanVACETransformer3DModel", **more)


def _lucy() -> Any:
    # Latents and the encoded video; diffusers keeps a second transformer for larger models.
    return _build("LucyEditPipeline", channels=4 + 4)()


_EXPERTS = {"experts": True}

ENTRIES = (
    _entry("text-to-video", {}, _plain()),
    _entry("text-to-video, decoded", {}, _build("WanPipeline")),
    _entry("text-to-video, no guidance", {"guidance_scale": 1.0}, _plain()),
    _entry("text-to-video, UniPC", {}, _plain(scheduler=unipc)),
    _entry("text-to-video, DPM-Solver++ 2M", {}, _plain(scheduler=dpm)),
    _entry("text-to-video, high-noise expert", {"guidance_scale_2": 2.0}, _plain(**_EXPERTS)),
    _entry("text-to-video, low-noise expert", {"guidance_scale_2": 2.0}, _plain(**_EXPERTS),
           component="transformer_2"),
    _entry("text-to-video, a timestep a token", {}, _plain(expand_timesteps=True)),
    _entry("image-to-video", {"image": pil}, _i2v(), "ImageToVideo"),
    _entry("image-to-video, two experts", {"image": pil}, _i2v(**_EXPERTS), "ImageToVideo"),
    _entry("image-to-video, UniPC", {"image": pil, "last_image": pil}, _i2v(scheduler=unipc),
           "ImageToVideo"),
    _entry("image-to-video, a timestep a token", {"image": pil},
           _build("WanImageToVideoPipeline", expand_timesteps=True), "ImageToVideo"),
    _entry("video-to-video", {"video": _video, "strength": 0.7}, _build("WanVideoToVideoPipeline"),
           "VideoToVideo"),
    Entry("LucyEditPipeline", "video edit", _lucy, _prompt,
          given(video=_video, height=32, width=32, num_frames=_FRAMES, guidance_scale=3.0)),
    _entry("VACE", {"video": _video, "mask": _masks}, _vace(), "VACE"),
    _entry("VACE, reference image", {"reference_images": pil}, _vace(), "VACE"),
    _entry("VACE, two experts", {"video": _video, "mask": _masks}, _vace(**_EXPERTS), "VACE"),
)  # fmt: skip
