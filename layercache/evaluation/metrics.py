"""PSNR and SSIM of images against the uncached ones, in float.

Shape suffixes: N images, C channels, H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layercache.errors import LayerCacheError

PSNR_CEILING_DB = 120.0
"""What two equal images count as. float32 rounding alone leaves about 140 dB."""


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
