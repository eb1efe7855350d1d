"""All entries of the zoo."""

from __future__ import annotations

from tests.pipelines import qwen_image
from tests.pipelines.entry import Entry

ENTRIES: tuple[Entry, ...] = (*qwen_image.ENTRIES,)
BY_NAME = {entry.name: entry for entry in ENTRIES}
assert len(BY_NAME) == len(ENTRIES), "two entries have one name"
