"""LPIPS with weights from a local folder; never downloaded, and skipped where there are none.

Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
CVPR 2018. The network is AlexNet's five convolutions, written out here so that torchvision is not
needed; the weights are the published ones, in two files of one folder:

    alexnet.pth   torchvision's AlexNet checkpoint (`features.0.weight`, ...)
    lpips.pth     the linear layers (`lin0.model.1.weight`, ...), as the authors' `v0.1/alex.pth`
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from layercache.errors import LayerCacheError

FILES = ("alexnet.pth", "lpips.pth")
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
# Position in torchvision's `features`, then in and out channels, kernel, stride, padding, and
# whether a pooling layer stands before it.
_LAYERS = (
    (0, 3, 64, 11, 4, 2, False),
    (3, 64, 192, 5, 1, 2, True),
    (6, 192, 384, 3, 1, 1, True),
    (8, 384, 256, 3, 1, 1, False),
    (10, 256, 256, 3, 1, 1, False),
)
_SMALLEST = 64


class Lpips(nn.Module):
    """The metric with loaded weights."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(i, o, kernel, stride, padding) for _, i, o, kernel, stride, padding, _ in _LAYERS
        )
        self.weights = nn.ParameterList(torch.zeros(1, layer[2], 1, 1) for layer in _LAYERS)

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """(N,) distance of images (N, 3, H, W) in [0, 1]; 0 for equal ones.

        Images below 64 pixels are enlarged first: AlexNet's pooling leaves nothing of them.
        """
        total = torch.zeros(len(images))
        a, b = self._prepared(images), self._prepared(references)
        for layer, convolution, weight in zip(
            _LAYERS, self.convolutions, self.weights, strict=True
        ):
            if layer[-1]:
                a, b = (functional.max_pool2d(x, 3, 2) for x in (a, b))
            a, b = convolution(a).relu(), convolution(b).relu()
            difference = (_unit(a) - _unit(b)).pow(2)
            total = total + (difference * weight).sum(1).mean((1, 2))
        return total

    def _prepared(self, images: Tensor) -> Tensor:
        small = min(images.shape[2:])
        if small < _SMALLEST:
            images = functional.interpolate(
                images, scale_factor=_SMALLEST / small, mode="bilinear", align_corners=False
            )
        shift, scale = (torch.tensor(x).reshape(1, 3, 1, 1) for x in (_SHIFT, _SCALE))
        return (images.clamp(0, 1) * 2 - 1 - shift) / scale


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
        alexnet, linear = (torch.load(folder / name, weights_only=True) for name in FILES)
        model = Lpips()
        with torch.no_grad():
            for index, (layer, convolution) in enumerate(
                zip(_LAYERS, model.convolutions, strict=True)
            ):
                convolution.weight.copy_(alexnet[f"features.{layer[0]}.weight"])
                convolution.bias.copy_(alexnet[f"features.{layer[0]}.bias"])
                model.weights[index].copy_(linear[f"lin{index}.model.1.weight"])
    except (KeyError, RuntimeError, OSError, ValueError) as error:
        raise LayerCacheError(
            f"LPIPS is skipped: {folder} holds no weights of AlexNet and LPIPS v0.1 ({error})"
        ) from error
    return model.eval().requires_grad_(False)


def _unit(features: Tensor) -> Tensor:
    """Scaled to length 1 over channels."""
    return features / (features.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)
