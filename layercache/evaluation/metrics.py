"""PSNR and SSIM of images and videos against the uncached ones, in float.

Images are tensors (N, C, H, W), videos (N, F, C, H, W), as pipelines return them; a video's figure
is the mean over its frames of the frames' figures.

Shape suffixes: N images or videos, F frames, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from layercache.errors import LayerCacheError

_CHANNELS = (1, 3, 4)
"""Grey, RGB, RGB with alpha."""
PSNR_CEILING_DB = 120.0
"""What two equal images count as. float32 rounding alone leaves about 140 dB."""


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


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """(N,) float64 peak signal-to-noise ratio in dB of images or videos with range [0, 1].

    PSNR = -10 log10(mean squared error), in float64 on images clamped to [0, 1]: never on uint8,
    whose differences wrap. Values are capped at `PSNR_CEILING_DB`, so equal images stay finite.

    Raises:
        LayerCacheError: The shapes differ, or a pixel is NaN.

    Example:
        >>> psnr(torch.full((1, 3, 8, 8), 0.6), torch.full((1, 3, 8, 8), 0.5))
        tensor([20.0000], dtype=torch.float64)
    """
    return by_frame(lambda a, b: _decibels((a - b).pow(2).flatten(1).mean(1)), images, references)


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


def ssim(images: Tensor, references: Tensor) -> Tensor:
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

    return by_frame(measure, images, references)


def fidelity(images: Tensor, references: Tensor, *, decoded: bool = True) -> Fidelity:
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


def by_frame(
    measure: Callable[[Tensor, Tensor], Tensor], images: Tensor, references: Tensor
) -> Tensor:
    """(N,) means over frames of what is measured between (N F, C, H, W) frames in [0, 1]."""
    layout = "(N, C, H, W) or (N, F, C, H, W), with 1, 3 or 4 channels"
    a, b = _checked(images, references, layout, smallest=4)
    if a.ndim > 5 or a.shape[-3] not in _CHANNELS:
        raise LayerCacheError(f"a tensor of shape {tuple(a.shape)} holds no images: give {layout}")
    frames = [pictures.clamp(0, 1).reshape(-1, *pictures.shape[-3:]) for pictures in (a, b)]
    return measure(*frames).reshape(len(a), -1).mean(1)


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
