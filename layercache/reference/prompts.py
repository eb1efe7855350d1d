"""Captions for the reference model, split once: calibration, validation and held-out.

Calibration prompts feed statistics, validation prompts choose between designs, and held-out prompts
are only ever reported. Each split has a random stream of its own, and so has the training data, so
no two of them share a scene.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from layercache.reference._scenes import describe, sample_scene

Split = Literal["calibration", "validation", "held-out"]

TRAINING_STREAM = 0
_STREAMS: dict[str, int] = {"calibration": 1, "validation": 2, "held-out": 3}


def prompts(split: Split, count: int, openness: float = 0.4) -> list[str]:
    """The first `count` captions of a split.

    Args:
        split: `"calibration"`, `"validation"` or `"held-out"`.
        count: How many; a longer list starts with the shorter one.
        openness: Probability that a caption leaves a fact open (see `scenes.describe`).

    Example:
        >>> prompts("calibration", 2) == prompts("calibration", 4)[:2]
        True
    """
    if split not in _STREAMS:
        raise ValueError(f"split is {split!r}; use one of {', '.join(map(repr, _STREAMS))}")
    return [_caption(_STREAMS[split], index, openness) for index in range(count)]


def _caption(stream: int, index: int, openness: float) -> str:
    rng = np.random.default_rng([stream, index])
    return describe(sample_scene(rng), rng, openness)
