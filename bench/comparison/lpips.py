"""LPIPS with weights from a local folder; never downloaded, and skipped where there are none.

Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
CVPR 2018. The network is AlexNet's five convolutions, written out here so that torchvision is not
needed; the weights are the published ones, in two files of one folder:

    alexnet.pth   torchvision's AlexNet checkpoint (`features.0.weight`, ...)
    lpips.pth     the linear layers (`lin0.model.1.weight`, ...), as the authors' `v0.1/alex.pth`
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from layercache.errors import LayerCacheError
from layercache.evaluation.metrics import by_frame

FILES = ("alexnet.pth", "lpips.pth")
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
# Position in torchvision's `features`, stride, padding, and whether a pooling layer stands before.
_LAYERS = ((0, 4, 2, False), (3, 1, 2, True), (6, 1, 1, True), (8, 1, 1, False), (10, 1, 1, False))
_SMALLEST = 64


@dataclass(frozen=True, eq=False)
class Lpips:
    """The metric with loaded weights: one kernel, bias and channel weight a layer."""

    kernels: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    channels: tuple[Tensor, ...]

    def __call__(self, images: Tensor, references: Tensor) -> Tensor:
        """(N,) distance of images or videos in [0, 1], the mean over frames; 0 for equal ones.

        Images below 64 pixels are enlarged first: AlexNet's pooling leaves nothing of them.
        """
        return by_frame(self._distances, images, references)

    def _distances(self, images: Tensor, references: Tensor) -> Tensor:
        total = torch.zeros(len(images))
        a, b = _prepared(images.float()), _prepared(references.float())
        for layer, kernel, bias, weight in zip(
            _LAYERS, self.kernels, self.biases, self.channels, strict=True
        ):
            _, stride, padding, pooled = layer
            if pooled:
                a, b = (functional.max_pool2d(x, 3, 2) for x in (a, b))
            a, b = (functional.conv2d(x, kernel, bias, stride, padding).relu() for x in (a, b))
            total = total + ((_unit(a) - _unit(b)).pow(2) * weight).sum(1).mean((1, 2))
        return total


def load_lpips(folder: Path) -> Lpips:
    """Read the two weight files of `folder`.

    Raises:
        LayerCacheError: A file is missing, or does not hold what it should.
    """
    for name in FILES:
        if not (folder / name).is_file():
            raise LayerCacheError(
                f"LPIPS is skipped: {folder / name} does not exist; the folder must hold "
                f"{' and '.join(FILES)} (they are never downloaded)"
            )
    try:
        alexnet, linear = (
            torch.load(folder / name, weights_only=True, map_location="cpu") for name in FILES
        )
        metric = Lpips(
            kernels=tuple(alexnet[f"features.{layer[0]}.weight"].float() for layer in _LAYERS),
            biases=tuple(alexnet[f"features.{layer[0]}.bias"].float() for layer in _LAYERS),
            channels=tuple(
                linear[f"lin{index}.model.1.weight"].float() for index in range(len(_LAYERS))
            ),
        )
        metric(torch.zeros(1, 3, _SMALLEST, _SMALLEST), torch.zeros(1, 3, _SMALLEST, _SMALLEST))
    except (KeyError, RuntimeError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise LayerCacheError(
            f"LPIPS is skipped: {folder} holds no weights of AlexNet and LPIPS v0.1 "
            f"({type(error).__name__}: {error})"
        ) from error
    return metric


def _prepared(images: Tensor) -> Tensor:
    height, width = images.shape[2:]
    if min(height, width) < _SMALLEST:
        factor = _SMALLEST / min(height, width)
        size = (round(height * factor), round(width * factor))
        images = functional.interpolate(images, size, mode="bilinear", align_corners=False)
    shift, scale = (torch.tensor(x).reshape(1, 3, 1, 1) for x in (_SHIFT, _SCALE))
    return (images.clamp(0, 1) * 2 - 1 - shift) / scale


def _unit(features: Tensor) -> Tensor:
    """Scaled to length 1 over channels."""
    return features / (features.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)
