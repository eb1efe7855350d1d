"""All entries of the zoo."""

from __future__ import annotations

from tests.pipelines import (
    flux,
    hunyuan,
    images,
    modular,
    more_images,
    others,
    qwen_image,
    sd3,
    video,
    wan,
    z_image,
)
from tests.pipelines.entry import Entry

_MODULES = (qwen_image, flux, sd3, z_image, hunyuan, wan, video, images, more_images, modular,
            others)  # fmt: skip
ENTRIES: tuple[Entry, ...] = tuple(entry for module in _MODULES for entry in module.ENTRIES)
BY_NAME = {entry.name: entry for entry in ENTRIES}
SLACK_DB = 9.0
"""How far a run on the calibrated prompt may fall short of its plan's predicted PSNR. The worst are
LTX2's groups: errors of the audio, which come back to the video, have no price."""

MISSING = {
    "LTX2DFRPipeline": "keyframes and tiles of other runs are its input",
    "LTX2DFRTemporalRefinePipeline": "refines what another pipeline made; its sampler draws",
    "LTX2HDRPipeline": "LTX2Pipeline without audio, at other guidance settings",
    "LTX2InContextPipeline": "LTX2ConditionPipeline with more reference tokens",
    "LTXI2VLongMultiPromptPipeline": "several runs in one call, over windows of a long video",
    "VisualClozePipeline": "two in one call: VisualClozeGenerationPipeline, then FluxFillPipeline",
    "VisualClozeGenerationPipeline": "needs a text encoder for its layout prompt",
    "ZImageOmniPipeline": "needs a vision encoder for its images",
}
"""Pipelines of diffusers with a supported transformer that are not in the zoo, and why."""
assert len(BY_NAME) == len(ENTRIES), "two entries have one name"
