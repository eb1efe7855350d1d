"""HunyuanVideo, HunyuanVideo 1.5 and HunyuanImage, whose newer pipelines have guiders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import AdaptiveProjectedMixGuidance, ClassifierFreeGuidance

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
from tests.pipelines.vaes import (
    hunyuan15_vae,
    hunyuan_image_vae,
    hunyuan_refiner_vae,
    hunyuan_video_vae,
)

_VIDEO = {"height": 32, "width": 32, "num_frames": 5}


def _video_prompt(seed: int) -> Arguments:
    return {
        "prompt_embeds": embeds(TEXT, 24, seed=seed), "prompt_attention_mask": ones(TEXT),
        "pooled_prompt_embeds": embeds(24, seed=seed),
    }  # fmt: skip


def _guided_prompt(seed: int) -> Arguments:
    negative = _video_prompt(seed + 100)
    return _video_prompt(seed) | {f"negative_{name}": value for name, value in negative.items()}


def _video(pipeline: str, **sizes: Any) -> Callable[[], Any]:
    def build() -> Any:
        net = transformer("HunyuanVideoTransformer3DModel", **{"guidance_embeds": False} | sizes)
        return assemble(
            pipeline, scheduler=euler(shift=7.0), vae=hunyuan_video_vae(), transformer=net
        )

    return build


_CONCAT = {"in_channels": 9, "image_condition_type": "latent_concat"}
_HUNYUAN_VIDEO = (
    Entry("HunyuanVideoPipeline", "text-to-video",
          _video("HunyuanVideoPipeline", guidance_embeds=True), _video_prompt, given(**_VIDEO)),
    Entry("HunyuanVideoPipeline", "text-to-video, true guidance", _video("HunyuanVideoPipeline"),
          _guided_prompt, given(**_VIDEO, true_cfg_scale=3.0)),
    Entry("HunyuanVideoImageToVideoPipeline", "image-to-video",
          _video("HunyuanVideoImageToVideoPipeline", **_CONCAT), _guided_prompt,
          given(**_VIDEO | {"num_frames": 9}, image=pil, true_cfg_scale=3.0)),
    Entry("HunyuanVideoImageToVideoPipeline", "image-to-video, tokens replaced",
          _video("HunyuanVideoImageToVideoPipeline", image_condition_type="token_replace"),
          _video_prompt, given(**_VIDEO | {"num_frames": 9}, image=pil)),
    Entry("HunyuanSkyreelsImageToVideoPipeline", "image-to-video",
          _video("HunyuanSkyreelsImageToVideoPipeline", in_channels=8), _guided_prompt,
          given(**_VIDEO, image=pil, true_cfg_scale=3.0)),
)  # fmt: skip


def _two_encoders(seed: int, second: int = 20, silent: bool = False) -> Arguments:
    found = {}
    for sign, start in (("", seed), ("negative_", seed + 100)):
        found |= {
            f"{sign}prompt_embeds": embeds(TEXT, 24, seed=start),
            f"{sign}prompt_embeds_mask": ones(TEXT),
            f"{sign}prompt_embeds_2": embeds(3, second, seed=start) * (0.0 if silent else 1.0),
            f"{sign}prompt_embeds_mask_2": ones(3),
        }
    return found


def _video15(
    pipeline: str, guider: Callable[[], Any] | None = None, **sizes: Any
) -> Callable[[], Any]:
    def build() -> Any:
        net = transformer("HunyuanVideo15Transformer3DModel", **sizes)
        make = guider or (lambda: ClassifierFreeGuidance(guidance_scale=3.0))
        pipe = assemble(
            pipeline, scheduler=euler(shift=5.0), vae=hunyuan15_vae(), transformer=net,
            guider=make(),
        )  # fmt: skip
        # The tokens of a text-to-video run's empty image, 729 in the real one.
        pipe.vision_num_semantic_tokens = 4
        return pipe

    return build


def _image_to_video15() -> Any:
    pipe = _video15("HunyuanVideo15ImageToVideoPipeline", task_type="i2v")()
    # In the place of a vision encoder: embeddings of the right shape.
    shape = (pipe.vision_num_semantic_tokens, pipe.vision_states_dim)
    pipe._get_image_embeds = lambda **_: embeds(*shape, seed=9)
    return pipe


_HUNYUAN_VIDEO15 = (
    Entry("HunyuanVideo15Pipeline", "text-to-video", _video15("HunyuanVideo15Pipeline"),
          _two_encoders, given(**_VIDEO)),
    Entry("HunyuanVideo15Pipeline", "guidance in a window",
          _video15("HunyuanVideo15Pipeline",
                   lambda: ClassifierFreeGuidance(guidance_scale=3.0, start=0.2, stop=0.7)),
          _two_encoders, given(**_VIDEO)),
    Entry("HunyuanVideo15ImageToVideoPipeline", "image-to-video", _image_to_video15,
          _two_encoders, given(image=pil, num_frames=5)),
)  # fmt: skip


def _mixed(start: int | None, momentum: float = 0.0) -> Callable[[], Any]:
    options = {"guidance_scale": 3.0, "adaptive_projected_guidance_scale": 4.0}
    return lambda: AdaptiveProjectedMixGuidance(
        adaptive_projected_guidance_start_step=start,
        adaptive_projected_guidance_momentum=momentum, **options,
    )  # fmt: skip


def _image(guider: Callable[[], Any] | None = None, **sizes: Any) -> Callable[[], Any]:
    def build() -> Any:
        net = transformer("HunyuanImageTransformer2DModel", text_embed_2_dim=20, **sizes)
        made = None if guider is None else guider()
        return assemble(
            "HunyuanImagePipeline", scheduler=euler(shift=5.0), vae=hunyuan_image_vae(),
            transformer=net, guider=made, ocr_guider=made,
        )  # fmt: skip

    return build


def _refiner() -> Any:
    net = transformer(
        "HunyuanImageTransformer2DModel", in_channels=16, out_channels=8, patch_size=(1, 1, 1),
        rope_axes_dim=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip
    return assemble(
        "HunyuanImageRefinerPipeline", scheduler=euler(shift=4.0), vae=hunyuan_refiner_vae(),
        transformer=net,
    )  # fmt: skip


def _one_encoder(seed: int) -> Arguments:
    return {"prompt_embeds": embeds(TEXT, 24, seed=seed), "prompt_embeds_mask": ones(TEXT)}


_SIZE = {"height": 64, "width": 64}
_MEMORY = "momentum makes the guided output depend on earlier steps"
_HUNYUAN_IMAGE = (
    Entry("HunyuanImagePipeline", "text-to-image, mixed guidance", _image(_mixed(2)),
          _two_encoders, given(**_SIZE)),
    Entry("HunyuanImagePipeline", "distilled guidance", _image(guidance_embeds=True),
          _two_encoders, given(**_SIZE)),
    Entry("HunyuanImagePipeline", "mean flow, which reads the next timestep",
          _image(guidance_embeds=True, use_meanflow=True), _two_encoders, given(**_SIZE)),
    Entry("HunyuanImagePipeline", "guidance with momentum that sets in late",
          _image(_mixed(3, momentum=-0.5)), _two_encoders, given(**_SIZE), refused=_MEMORY),
    Entry("HunyuanImageRefinerPipeline", "refine", _refiner, _one_encoder,
          given(**_SIZE, image=lambda: pil(64))),
)  # fmt: skip

ENTRIES = (*_HUNYUAN_VIDEO, *_HUNYUAN_VIDEO15, *_HUNYUAN_IMAGE)
