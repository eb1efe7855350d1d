"""PSNR, SSIM and MS-SSIM of images against the uncached ones, in float.

Shape suffixes: N images, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from layercache.errors import LayerCacheError

PSNR_CEILING_DB = 120.0
"""What two equal images count as. float32 rounding alone leaves about 140 dB."""

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Weights of the five scales, the finest first (Wang, Simoncelli, Bovik, 2003)."""

_WINDOW = 11


@dataclass(frozen=True)
class Fidelity:
    """How close images are to the uncached ones: PSNR in dB and SSIM, per image.

    Attributes:
        psnr_db: One value an image, at most `PSNR_CEILING_DB`.
        ssim: One value an image, at most 1.
    """

    psnr_db: tuple[float, ...]
    ssim: tuple[float, ...]

    @property
    def psnr_mean(self) -> float:
        """Mean over images of the PSNR in dB (not the PSNR of the mean error)."""
        return sum(self.psnr_db) / len(self.psnr_db)

    @property
    def psnr_worst(self) -> float:
        """The lowest PSNR of any image, in dB."""
        return min(self.psnr_db)

    @property
    def psnr_median(self) -> float:
        """The median PSNR in dB."""
        return float(torch.tensor(self.psnr_db, dtype=torch.float64).quantile(0.5))

    @property
    def ssim_mean(self) -> float:
        """Mean SSIM over images."""
        return sum(self.ssim) / len(self.ssim)


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """(N,) float64 peak signal-to-noise ratio in dB of images (N, C, H, W) with range [0, 1].

    PSNR = -10 log10(mean squared error), in float64 on images clamped to [0, 1]: never on uint8,
    whose differences wrap. Values are capped at `PSNR_CEILING_DB`, so equal images stay finite.

    Raises:
        LayerCacheError: The shapes differ, or a pixel is NaN.

    Example:
        >>> psnr(torch.full((1, 3, 8, 8), 0.6), torch.full((1, 3, 8, 8), 0.5))
        tensor([20.0000], dtype=torch.float64)
    """
    a, b = _clamped(images, references)
    error = (a - b).pow(2).flatten(1).mean(1)
    return (-10 * error.clamp_min(10 ** (-PSNR_CEILING_DB / 10)).log10()).clamp_max(PSNR_CEILING_DB)


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """(N,) structural similarity of images (N, C, H, W) with range [0, 1].

    The usual form: Gaussian window of sigma 1.5, constants 0.01 and 0.03 (Wang et al., 2004), as
    torchmetrics computes it.

    Raises:
        LayerCacheError: The shapes differ, a pixel is NaN, or torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise LayerCacheError(
            "SSIM needs torchmetrics, which is not installed: pip install 'layercache-flow[eval]'"
        ) from error
    a, b = _clamped(images, references)
    value = structural_similarity_index_measure(
        a.float(), b.float(), data_range=1.0, reduction="none"
    )
    result: Tensor = value.reshape(len(a)).double()
    return result


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
    a, b = _clamped(images, references)
    scales = ms_ssim_scales(a.shape[2], a.shape[3])
    if scales < 2:
        return None
    chosen = MS_SSIM_WEIGHTS[:scales]
    weights = tuple(weight / sum(chosen) for weight in chosen)
    value = measure(
        a.float(), b.float(), data_range=1.0, reduction="none", betas=weights, normalize="relu"
    )
    result: Tensor = value.reshape(len(a)).double()
    return result


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


def fidelity(images: Tensor, references: Tensor) -> Fidelity:
    """PSNR and SSIM of every image."""
    return Fidelity(
        psnr_db=tuple(psnr(images, references).tolist()),
        ssim=tuple(ssim(images, references).tolist()),
    )


def _clamped(images: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    if images.shape != references.shape or images.ndim != 4 or not len(images):
        raise LayerCacheError(
            f"images of shape {tuple(images.shape)} cannot be compared with references of shape "
            f"{tuple(references.shape)}: both must be (N, C, H, W)"
        )
    pair = (images.detach().double().cpu(), references.detach().double().cpu())
    for name, tensor in zip(("images", "references"), pair, strict=True):
        if tensor.isnan().any():
            raise LayerCacheError(
                f"the {name} hold NaN pixels: the run overflowed; use float32 or bfloat16"
            )
    return pair[0].clamp(0, 1), pair[1].clamp(0, 1)
