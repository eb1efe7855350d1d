"""PSNR, SSIM and MS-SSIM of images and videos against the uncached ones, in float.

A video's figure is the mean over its frames of the frames' figures. All that `as_tensor` reads is
taken: tensors (N, C, H, W), (N, F, C, H, W) and (N, C, F, H, W), and lists of images or of frames.

Shape suffixes: N images or videos, F frames, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layercache.errors import LayerCacheError
from layercache.evaluation._frames import as_tensor, split_frames

PSNR_CEILING_DB = 120.0
"""What two equal images count as. float32 rounding alone leaves about 140 dB."""

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Weights of the five scales, the finest first (Wang, Simoncelli, Bovik, 2003)."""

_WINDOW = 11


@dataclass(frozen=True)
class Fidelity:
    """How close images or videos are to the uncached ones: PSNR in dB and SSIM of each.

    Attributes:
        psnr_db: One value an image or video, at most `PSNR_CEILING_DB`.
        ssim: One value an image or video, at most 1; None for latents, which have no pixels.
    """

    psnr_db: tuple[float, ...]
    ssim: tuple[float, ...] | None

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
    def ssim_mean(self) -> float | None:
        """Mean SSIM over images."""
        return None if self.ssim is None else sum(self.ssim) / len(self.ssim)


def psnr(images: Any, references: Any) -> Tensor:
    """(N,) float64 peak signal-to-noise ratio in dB of images or videos with range [0, 1].

    PSNR = -10 log10(mean squared error), in float64 on images clamped to [0, 1]: never on uint8,
    whose differences wrap. Values are capped at `PSNR_CEILING_DB`, so equal images stay finite.

    Raises:
        LayerCacheError: The shapes differ, or a pixel is NaN.

    Example:
        >>> psnr(torch.full((1, 3, 8, 8), 0.6), torch.full((1, 3, 8, 8), 0.5))
        tensor([20.0000], dtype=torch.float64)
    """
    return _by_frame(lambda a, b: _decibels((a - b).pow(2).flatten(1).mean(1)), images, references)


def latent_psnr(latents: Tensor, references: Tensor) -> Tensor:
    """(N,) float64 PSNR in dB of latents (N, ...), for pipelines that decode nothing.

    The peak is the range of each reference: PSNR = -10 log10(mean squared error / (max - min)^2),
    without clamping, capped at `PSNR_CEILING_DB`. It compares the runs of one pipeline with one
    another; to the PSNR of images it has no relation.

    Raises:
        LayerCacheError: The shapes differ, or a value is NaN.

    Example:
        >>> latent_psnr(torch.tensor([[0.0, 4.4]]), torch.tensor([[0.0, 4.0]])).round(decimals=2)
        tensor([23.0100], dtype=torch.float64)
    """
    a, b = _checked(latents, references, "(N, ...)", smallest=2)
    flat = b.flatten(1)
    span = flat.amax(1) - flat.amin(1)
    error = (a - b).pow(2).flatten(1).mean(1)
    return _decibels(error / span.clamp_min(1e-12).pow(2))


def ssim(images: Any, references: Any) -> Tensor:
    """(N,) structural similarity of images or videos with range [0, 1].

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

    def measure(a: Tensor, b: Tensor) -> Tensor:
        value: Tensor = structural_similarity_index_measure(
            a.float(), b.float(), data_range=1.0, reduction="none"
        )
        return value.reshape(len(a)).double()

    return _by_frame(measure, images, references)


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


def ms_ssim(images: Any, references: Any) -> Tensor | None:
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
    scales = ms_ssim_scales(*as_tensor(references).shape[-2:])
    if scales < 2:
        return None
    chosen = MS_SSIM_WEIGHTS[:scales]
    weights = tuple(weight / sum(chosen) for weight in chosen)

    def of_frames(a: Tensor, b: Tensor) -> Tensor:
        value: Tensor = measure(
            a.float(), b.float(), data_range=1.0, reduction="none", betas=weights, normalize="relu"
        )
        return value.reshape(len(a)).double()

    return _by_frame(of_frames, images, references)


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


def fidelity(images: Any, references: Any, *, decoded: bool = True) -> Fidelity:
    """PSNR and SSIM of every image or video; of latents, where nothing was decoded, the PSNR."""
    if not decoded:
        return Fidelity(psnr_db=tuple(latent_psnr(images, references).tolist()), ssim=None)
    return Fidelity(
        psnr_db=tuple(psnr(images, references).tolist()),
        ssim=tuple(ssim(images, references).tolist()),
    )


def _decibels(error: Tensor) -> Tensor:
    """-10 log10 of squared errors relative to the squared peak."""
    return (-10 * error.clamp_min(10 ** (-PSNR_CEILING_DB / 10)).log10()).clamp_max(PSNR_CEILING_DB)


def _by_frame(measure: Callable[[Tensor, Tensor], Tensor], images: Any, references: Any) -> Tensor:
    """(N,) means over frames of what is measured between the frames, clamped to [0, 1]."""
    a, b = _checked(as_tensor(images), as_tensor(references), "(N, C, H, W) or (N, F, C, H, W)", 4)
    (a, count), (b, _) = split_frames(a.clamp(0, 1)), split_frames(b.clamp(0, 1))
    return measure(a, b).reshape(-1, count).mean(1)


def _checked(
    images: Tensor, references: Tensor, layout: str, smallest: int
) -> tuple[Tensor, Tensor]:
    if images.shape != references.shape or images.ndim < smallest or not images.numel():
        raise LayerCacheError(
            f"images of shape {tuple(images.shape)} cannot be compared with references of shape "
            f"{tuple(references.shape)}: both must be {layout}"
        )
    pair = (images.detach().double().cpu(), references.detach().double().cpu())
    for name, tensor in zip(("images", "references"), pair, strict=True):
        if tensor.isnan().any():
            raise LayerCacheError(
                f"the {name} hold NaN: the run overflowed; use float32 or bfloat16"
            )
    return pair
