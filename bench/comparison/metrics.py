"""Figures that only the bench reports: MS-SSIM, and how far a mean depends on the prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from layercache.errors import LayerCacheError
from layercache.evaluation.metrics import by_frame

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Weights of the five scales, the finest first (Wang, Simoncelli, Bovik, 2003)."""

_WINDOW = 11


def ms_ssim_scales(height: int, width: int) -> int:
    """How many of the five scales of MS-SSIM an image is large enough for; 1 means none but SSIM.

    The Gaussian window of 11 pixels must fit into the coarsest scale, as torchmetrics counts it.

    Example:
        >>> ms_ssim_scales(32, 32), ms_ssim_scales(1024, 1024)
        (2, 5)
    """
    side = min(height, width)
    fits = [
        scales
        for scales in range(2, len(MS_SSIM_WEIGHTS) + 1)
        if side >= 2**scales and side // (scales - 1) ** 2 >= _WINDOW
    ]
    return max(fits, default=1)


def ms_ssim(images: Tensor, references: Tensor) -> Tensor | None:
    """(N,) multi-scale structural similarity, or None where images are smaller than 2 scales need.

    Small images have fewer than five scales (see `ms_ssim_scales`); the weights of those that
    remain are scaled to sum to 1, so the value is comparable between images of one size only.

    Raises:
        LayerCacheError: The shapes differ, a pixel is NaN, or torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.image import (
            multiscale_structural_similarity_index_measure as measure,
        )
    except ImportError as error:
        raise LayerCacheError(
            "MS-SSIM needs torchmetrics, which is not installed: "
            "pip install 'layercache-flow[eval]'"
        ) from error
    scales = ms_ssim_scales(*references.shape[-2:])
    if scales < 2:
        return None
    chosen = MS_SSIM_WEIGHTS[:scales]
    weights = tuple(weight / sum(chosen) for weight in chosen)

    def of_frames(a: Tensor, b: Tensor) -> Tensor:
        value: Tensor = measure(
            a.float(), b.float(), data_range=1.0, reduction="none", betas=weights, normalize="relu"
        )
        return value.reshape(len(a)).double()

    return by_frame(of_frames, images, references)


def bootstrap_interval(
    values: Sequence[float], level: float = 0.95, samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean under resampling of the values (Efron, 1979).

    It says how far the mean depends on which prompts were drawn, and nothing about timing noise.

    Example:
        >>> bootstrap_interval([1.0, 1.0, 1.0])
        (1.0, 1.0)
    """
    data = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(data), size=(samples, len(data)))
    low, high = np.quantile(data[drawn].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
