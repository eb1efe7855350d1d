"""Images and videos in the forms in which pipelines return them, as one tensor; and its frames.

Shape suffixes: N images or videos, F frames, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layercache.errors import LayerCacheError

_CHANNELS = (1, 3, 4)
"""Grey, RGB, RGB with alpha."""


def as_tensor(pictures: Any) -> Tensor:
    """(N, C, H, W) images or (N, F, C, H, W) videos, in float.

    Args:
        pictures: A tensor (N, C, H, W), (N, F, C, H, W) or (N, C, F, H, W) in [0, 1]; an array with
            its channels last; a list of PIL images, or of arrays or tensors without N; or a list
            of such lists, one a video.

    Raises:
        LayerCacheError: It is none of these, or its frames differ in size.

    Example:
        >>> as_tensor(torch.zeros(2, 3, 5, 32, 48)).shape
        torch.Size([2, 5, 3, 32, 48])
        >>> as_tensor([np.zeros((32, 48, 3))]).shape
        torch.Size([1, 3, 32, 48])
    """
    if isinstance(pictures, Tensor):
        return _with_frames_first(pictures)
    if isinstance(pictures, np.ndarray):
        return _from_array(pictures)
    if isinstance(pictures, Sequence) and not isinstance(pictures, str) and pictures:
        return _stacked([_one(item) for item in pictures])
    raise LayerCacheError(
        f"a {type(pictures).__name__} holds no images: give a tensor (N, C, H, W) or "
        "(N, F, C, H, W), or a list of images or of frames"
    )


def split_frames(pictures: Tensor) -> tuple[Tensor, int]:
    """All frames (N F, C, H, W) of images or videos, and F, which is 1 for images."""
    if pictures.ndim == 5:
        return pictures.flatten(0, 1), pictures.shape[1]
    return pictures, 1


def _one(item: Any) -> Tensor:
    if isinstance(item, Tensor):
        return as_tensor(item[None])[0]
    if isinstance(item, np.ndarray):
        return _from_array(item[None])[0]
    if isinstance(item, Sequence) and not isinstance(item, str) and item:
        return _stacked([_one(frame) for frame in item])
    if hasattr(item, "__array_interface__"):
        return _from_array(np.asarray(item)[None])[0]
    raise LayerCacheError(
        f"a {type(item).__name__} is no image: give PIL images, arrays with their channels last, "
        "or tensors"
    )


def _stacked(items: list[Tensor]) -> Tensor:
    shapes = {tuple(item.shape) for item in items}
    if len(shapes) > 1:
        raise LayerCacheError(
            f"the images have the shapes {', '.join(map(str, sorted(shapes)))}: only those of one "
            "size can be compared, and videos of as many frames"
        )
    return torch.stack(items)


def _from_array(array: Any) -> Tensor:
    values = np.asarray(array)
    if values.ndim == 3:  # grey images
        values = values[..., None]
    if values.ndim not in (4, 5) or values.shape[-1] not in _CHANNELS:
        raise LayerCacheError(
            f"an array of shape {values.shape} holds no images: their channels must be last"
        )
    scale = 255.0 if values.dtype == np.uint8 else 1.0
    return torch.from_numpy(np.array(values)).movedim(-1, -3).float() / scale


def _with_frames_first(pictures: Tensor) -> Tensor:
    if pictures.ndim == 4:
        return pictures
    if pictures.ndim == 5:
        # Pipelines return frames before channels, models work with channels first; and four
        # frames of three channels are no three frames with alpha.
        frames_first, channels_first = pictures.shape[2], pictures.shape[1]
        if frames_first == 3 or (frames_first in _CHANNELS and channels_first != 3):
            return pictures
        if channels_first in _CHANNELS:
            return pictures.transpose(1, 2)
    raise LayerCacheError(
        f"a tensor of shape {tuple(pictures.shape)} holds no images: it must be (N, C, H, W), or "
        "(N, F, C, H, W) or (N, C, F, H, W) with 1, 3 or 4 channels"
    )
