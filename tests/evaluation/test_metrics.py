"""PSNR and SSIM against values worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from bench.comparison.lpips import load_lpips
from bench.comparison.metrics import ms_ssim, ms_ssim_scales
from layercache.errors import LayerCacheError
from layercache.evaluation.metrics import (
    PSNR_CEILING_DB,
    fidelity,
    psnr,
    ssim,
)


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
    with pytest.raises(LayerCacheError, match="images hold NaN"):
        psnr(images, torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("side,scales", [(8, 1), (16, 2), (32, 2), (64, 3), (160, 4), (176, 5)])
def test_ms_ssim_uses_the_scales_that_an_image_has_room_for(side: int, scales: int) -> None:
    assert ms_ssim_scales(side, side) == scales
    reference = torch.rand(2, 3, side, side)
    value = ms_ssim(reference, reference)
    if scales == 1:
        assert value is None
    else:
        assert value is not None and value.tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


def test_ms_ssim_falls_with_noise() -> None:
    torch.manual_seed(0)
    reference = torch.rand(2, 3, 32, 32)
    values = [ms_ssim(reference + s * torch.randn_like(reference), reference) for s in (0.05, 0.3)]
    assert values[0] is not None and values[1] is not None
    assert (values[0] > values[1]).all() and (values[1] < 0.95).all()


SHAPES = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}


def lpips_weights(folder: Path) -> None:
    """Random weights in the files and shapes of the published ones."""
    torch.manual_seed(0)
    alexnet, linear = {}, {}
    for layer, (position, (out, channels, kernel)) in enumerate(SHAPES.items()):
        alexnet[f"features.{position}.weight"] = 0.05 * torch.randn(out, channels, kernel, kernel)
        alexnet[f"features.{position}.bias"] = torch.zeros(out)
        linear[f"lin{layer}.model.1.weight"] = torch.rand(1, out, 1, 1) / out
    torch.save(alexnet, folder / "alexnet.pth")
    torch.save(linear, folder / "lpips.pth")


def test_lpips_with_local_weights_is_zero_for_equal_images_and_grows(tmp_path: Path) -> None:
    lpips_weights(tmp_path)
    metric = load_lpips(tmp_path)
    reference = torch.rand(2, 3, 32, 32)
    noise = torch.randn_like(reference)
    assert metric(reference, reference).tolist() == [0.0, 0.0]
    near, far = (metric(reference + size * noise, reference) for size in (0.02, 0.3))
    assert (near > 0).all() and (near < far).all()
    assert metric(torch.rand(1, 3, 100, 70), torch.rand(1, 3, 100, 70)).shape == (1,)


def test_lpips_without_weights_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(LayerCacheError, match=r"LPIPS is skipped: .*alexnet.pth does not exist"):
        load_lpips(tmp_path)
    lpips_weights(tmp_path)
    torch.save({}, tmp_path / "lpips.pth")
    with pytest.raises(LayerCacheError, match="holds no weights of AlexNet and LPIPS"):
        load_lpips(tmp_path)
    (tmp_path / "alexnet.pth").write_bytes(b"nothing")
    with pytest.raises(LayerCacheError, match="holds no weights of AlexNet and LPIPS"):
        load_lpips(tmp_path)
