"""LTX, LTX2 (video with audio), Mochi, Kandinsky 5 and Cosmos3."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

from tests.pipelines.entry import (
    TEXT,
    Arguments,
    Entry,
    assemble,
    embeds,
    euler,
    given,
    ones,
    picture,
    pil,
    transformer,
    unfrozen,
    unipc,
)
from tests.pipelines.vaes import (
    audio_vae,
    hunyuan_video_vae,
    image_vae,
    ltx2_vae,
    ltx_vae,
    vocoder,
    wan_vae,
)

_SIZE = {"height": 32, "width": 32}


def _prompt(seed: int) -> Arguments:
    return {
        "prompt_embeds": embeds(TEXT, 24, seed=seed), "prompt_attention_mask": ones(TEXT),
        "negative_prompt_embeds": embeds(TEXT, 24, seed=seed + 100),
        "negative_prompt_attention_mask": ones(TEXT),
    }  # fmt: skip


# -- LTX -------------------------------------------------------------------------------------------


def _ltx(pipeline: str, **scheduler: Any) -> Callable[[], Any]:
    return lambda: assemble(
        pipeline, scheduler=euler(**scheduler or {"use_dynamic_shifting": True}), vae=ltx_vae(),
        transformer=transformer("LTXVideoTransformer3DModel"),
    )  # fmt: skip


_LTX_CALL = {**_SIZE, "num_frames": 9, "guidance_scale": 3.0}
_CONDITION = _ltx("LTXConditionPipeline", shift=1.0)
_LTX = (
    Entry("LTXPipeline", "text-to-video", _ltx("LTXPipeline"), _prompt, given(**_LTX_CALL)),
    Entry("LTXPipeline", "guidance rescaled", _ltx("LTXPipeline"), _prompt,
          given(**_LTX_CALL, guidance_rescale=0.7)),
    Entry("LTXImageToVideoPipeline", "image-to-video", _ltx("LTXImageToVideoPipeline"), _prompt,
          given(**_LTX_CALL, image=picture)),
    Entry("LTXConditionPipeline", "first frame given", _CONDITION, _prompt,
          given(**_LTX_CALL, image=picture, image_cond_noise_scale=0.0), partial=True,
          negated=True),
    Entry("LTXConditionPipeline", "first frame given, noise added to it every step", _CONDITION,
          _prompt, given(**_LTX_CALL, image=picture), partial=True, negated=True),
)  # fmt: skip

# -- LTX2 ------------------------------------------------------------------------------------------


def _connectors() -> Any:
    torch.manual_seed(5)
    return unfrozen(
        LTX2TextConnectors(
            caption_channels=24, text_proj_in_factor=1, rope_double_precision=False,
            video_connector_num_attention_heads=2, video_connector_attention_head_dim=12,
            video_connector_num_layers=1, video_connector_num_learnable_registers=None,
            audio_connector_num_attention_heads=2, audio_connector_attention_head_dim=12,
            audio_connector_num_layers=1, audio_connector_num_learnable_registers=None,
            connector_rope_base_seq_len=32,
        )
    )  # fmt: skip


def _ltx2(pipeline: str) -> Callable[[], Any]:
    return lambda: assemble(
        pipeline, scheduler=euler(use_dynamic_shifting=True), vae=ltx2_vae(),
        audio_vae=audio_vae(), vocoder=vocoder(), connectors=_connectors(),
        transformer=transformer("LTX2VideoTransformer3DModel"),
    )  # fmt: skip


_LTX2_CALL = {
    **_SIZE, "num_frames": 5, "frame_rate": 25.0, "guidance_scale": 3.0, "guidance_rescale": 0.0,
    "audio_guidance_scale": 3.0, "audio_guidance_rescale": 0.0, "stg_scale": 0.0,
    "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0,
    "spatio_temporal_guidance_blocks": None,
}  # fmt: skip
_FOUR_CALLS = {
    "stg_scale": 1.0, "audio_stg_scale": 1.0, "spatio_temporal_guidance_blocks": [1],
    "modality_scale": 2.0, "audio_modality_scale": 2.0, "guidance_rescale": 0.7,
}  # fmt: skip


def _first_frame() -> Any:
    return [LTX2VideoCondition(frames=pil(), index=0, crf=0)]


_LTX2 = (
    Entry("LTX2Pipeline", "text-to-video with audio", _ltx2("LTX2Pipeline"), _prompt,
          given(**_LTX2_CALL)),
    Entry("LTX2Pipeline", "three kinds of guidance", _ltx2("LTX2Pipeline"), _prompt,
          given(**_LTX2_CALL | _FOUR_CALLS)),
    Entry("LTX2ImageToVideoPipeline", "image-to-video with audio",
          _ltx2("LTX2ImageToVideoPipeline"), _prompt, given(**_LTX2_CALL, image=pil, image_crf=0)),
    Entry("LTX2ConditionPipeline", "first frame given, with audio", _ltx2("LTX2ConditionPipeline"),
          _prompt, given(**_LTX2_CALL, conditions=_first_frame), partial=True),
)  # fmt: skip

# -- Mochi -----------------------------------------------------------------------------------------


def _mochi(**scheduler: Any) -> Callable[[], Any]:
    return lambda: assemble(
        "MochiPipeline",
        scheduler=euler(**scheduler),
        transformer=transformer("MochiTransformer3DModel"),
    )


def _mochi_prompt(seed: int) -> Arguments:
    return {name: v.bool() if "mask" in name else v for name, v in _prompt(seed).items()}


_MOCHI_CALL = {"height": 64, "width": 64, "num_frames": 7, "guidance_scale": 3.0}
_MOCHI = (
    Entry("MochiPipeline", "text-to-video", _mochi(invert_sigmas=True, shift=1.0), _mochi_prompt,
          given(**_MOCHI_CALL), negated=True),
    Entry("MochiPipeline", "text-to-video, falling noise levels", _mochi(), _mochi_prompt,
          given(**_MOCHI_CALL)),
)  # fmt: skip

# -- Kandinsky 5 -----------------------------------------------------------------------------------


def _kandinsky_prompt(seed: int) -> Arguments:
    found = {}
    for sign, start in (("", seed), ("negative_", seed + 100)):
        found |= {
            f"{sign}prompt_embeds_qwen": embeds(TEXT, 24, seed=start),
            f"{sign}prompt_embeds_clip": embeds(20, seed=start),
            f"{sign}prompt_cu_seqlens": torch.tensor([0, TEXT], dtype=torch.int32),
        }
    return found


def _kandinsky(pipeline: str, vae: Callable[[], Any], **sizes: Any) -> Callable[[], Any]:
    def build() -> Any:
        net = transformer("Kandinsky5Transformer3DModel", **sizes)
        pipe = assemble(pipeline, scheduler=euler(shift=5.0), vae=vae(), transformer=net)
        # The pipelines for images accept a few sizes only.
        pipe.resolutions = [(64, 64)]
        return pipe

    return build


_COND = {"visual_cond": True}
_IMAGE = {"height": 64, "width": 64, "guidance_scale": 3.0}
_CLIP = {**_SIZE, "num_frames": 5, "guidance_scale": 3.0}
_KANDINSKY = (
    Entry("Kandinsky5T2VPipeline", "text-to-video",
          _kandinsky("Kandinsky5T2VPipeline", hunyuan_video_vae), _kandinsky_prompt,
          given(**_CLIP)),
    Entry("Kandinsky5I2VPipeline", "image-to-video",
          _kandinsky("Kandinsky5I2VPipeline", hunyuan_video_vae, **_COND), _kandinsky_prompt,
          given(**_CLIP | {"num_frames": 21}, image=pil)),
    Entry("Kandinsky5T2IPipeline", "text-to-image", _kandinsky("Kandinsky5T2IPipeline", image_vae),
          _kandinsky_prompt, given(**_IMAGE)),
    Entry("Kandinsky5I2IPipeline", "edit", _kandinsky("Kandinsky5I2IPipeline", image_vae, **_COND),
          _kandinsky_prompt, given(**_IMAGE, image=lambda: pil(64))),
)  # fmt: skip

# -- Cosmos3 ---------------------------------------------------------------------------------------


class LetterTokenizer:
    """In the place of a chat tokenizer: one of 28 tokens a letter, of the last eight."""

    eos_token_id = 31

    def convert_tokens_to_ids(self, token: str) -> int:
        """The one special token."""
        return 30

    def apply_chat_template(self, conversations: Any, **_: Any) -> Any:
        """The tokens of all that was said."""
        text = "".join(turn["content"] for turn in conversations)
        return SimpleNamespace(input_ids=[ord(letter) % 28 for letter in text[:8]])


def _cosmos() -> Any:
    net = transformer("Cosmos3OmniTransformer")
    return assemble(
        "Cosmos3OmniPipeline", scheduler=unipc(), vae=wan_vae(), transformer=net,
        text_tokenizer=LetterTokenizer(), enable_safety_checker=False,
    )  # fmt: skip


def _cosmos_prompt(seed: int) -> Arguments:
    return {"prompt": f"{seed} red circles", "negative_prompt": "blur"}


_COSMOS_CALL = {
    **_SIZE, "num_frames": 5, "guidance_scale": 3.0, "use_system_prompt": False,
    "enable_safety_check": False,
}  # fmt: skip
_COSMOS = (
    Entry("Cosmos3OmniPipeline", "text-to-video", _cosmos, _cosmos_prompt, given(**_COSMOS_CALL)),
    Entry("Cosmos3OmniPipeline", "text-to-image", _cosmos, _cosmos_prompt,
          given(**_COSMOS_CALL | {"num_frames": 1})),
    Entry("Cosmos3OmniPipeline", "image-to-video", _cosmos, _cosmos_prompt,
          given(**_COSMOS_CALL, image=pil), partial=True),
)  # fmt: skip

ENTRIES = (*_LTX, *_LTX2, *_MOCHI, *_KANDINSKY, *_COSMOS)
