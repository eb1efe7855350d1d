"""All entries of the zoo."""

from __future__ import annotations

from tests.pipelines import flux, hunyuan, images, more_images, qwen_image, sd3, video, wan, z_image
from tests.pipelines.entry import Entry

_MODULES = (qwen_image, flux, sd3, z_image, hunyuan, wan, video, images, more_images)
ENTRIES: tuple[Entry, ...] = tuple(entry for module in _MODULES for entry in module.ENTRIES)
BY_NAME = {entry.name: entry for entry in ENTRIES}
assert len(BY_NAME) == len(ENTRIES), "two entries have one name"
