"""The few tensor operations of a prediction, safe in half precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layercache.models.tensors import finite


def affine(value: Tensor, earlier: Sequence[Tensor], taps: Sequence[float]) -> Tensor:
    """`value + sum of taps (value - other)`, accumulated in float32 at least.

    The value itself where there is nothing to add. One tap is one `lerp`, which reads both tensors
    once and accumulates in float32 by itself.
    """
    if not taps:
        return value
    if len(taps) == 1:
        return finite(torch.lerp(earlier[0].to(value), value, 1.0 + taps[0]))
    wide = torch.promote_types(value.dtype, torch.float32)
    result = value.to(wide) * (1.0 + sum(taps))
    for other, tap in zip(earlier, taps, strict=True):
        result = result.add_(other.to(result), alpha=-tap)
    return finite(result.to(value.dtype))


def add(stream: Tensor, residual: Tensor) -> Tensor:
    """`stream + residual`, in the dtype of the stream and on the device of the residual."""
    return finite(stream.to(residual.device) + residual.to(stream.dtype))


def signature(args: Any, kwargs: Any) -> tuple[Any, ...]:
    """Shape, dtype, device and place of every tensor among the arguments of a call."""
    return tuple(_described(value) for value in (*args, *kwargs.values()) if value is not None)


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    if isinstance(value, dict):
        return tuple((key, _described(item)) for key, item in value.items())
    if isinstance(value, (tuple, list)):
        return tuple(_described(item) for item in value)
    return None
