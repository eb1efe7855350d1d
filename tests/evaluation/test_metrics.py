"""PSNR and SSIM against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from layercache.errors import LayerCacheError
from layercache.evaluation.metrics import PSNR_CEILING_DB, fidelity, psnr, ssim


def test_psnr_of_a_constant_error() -> None:
    reference = torch.full((2, 3, 16, 16), 0.5)
    images = reference + torch.tensor([0.1, 0.01]).reshape(2, 1, 1, 1)
    assert psnr(images, reference).tolist() == pytest.approx([20.0, 40.0], abs=1e-4)


def test_psnr_of_equal_images_is_the_ceiling_and_finite() -> None:
    images = torch.rand(1, 3, 16, 16)
    assert psnr(images, images).tolist() == [PSNR_CEILING_DB]


def test_psnr_is_per_image_and_mean_worst_median_follow() -> None:
    reference = torch.zeros(3, 3, 16, 16)
    images = torch.tensor([0.1, 0.01, 0.001]).reshape(3, 1, 1, 1).expand(3, 3, 16, 16)
    result = fidelity(images, reference)
    assert result.psnr_mean == pytest.approx(40, abs=1e-4)
    assert result.psnr_worst == pytest.approx(20, abs=1e-4)
    assert result.psnr_median == pytest.approx(40, abs=1e-4)


def test_pixels_are_clamped_before_they_are_compared() -> None:
    reference = torch.ones(1, 3, 16, 16)
    assert psnr(reference + 5, reference).item() == PSNR_CEILING_DB


def test_psnr_does_not_wrap_as_uint8_differences_do() -> None:
    # In uint8, 0 - 255 wraps to 1, and black against white would score 48 dB.
    assert psnr(torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)).item() == pytest.approx(0.0)


def test_ssim_of_equal_images_is_one_and_falls_with_noise() -> None:
    torch.manual_seed(0)
    reference = torch.rand(2, 3, 32, 32)
    noisy = reference + 0.2 * torch.randn_like(reference)
    assert ssim(reference, reference).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    values = ssim(noisy, reference)
    assert values.shape == (2,) and (values < 0.95).all()


def test_images_of_different_shapes_are_refused() -> None:
    with pytest.raises(
        LayerCacheError, match=r"\(1, 3, 8, 8\) cannot be compared with .*3, 16, 16"
    ):
        psnr(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 16, 16))


def test_nan_pixels_are_refused() -> None:
    images = torch.full((1, 3, 16, 16), math.nan)
    with pytest.raises(LayerCacheError, match="the images hold NaN pixels: the run overflowed"):
        psnr(images, torch.zeros(1, 3, 16, 16))
