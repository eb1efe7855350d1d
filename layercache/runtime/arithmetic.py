"""The few tensor operations of a prediction, safe in half precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layercache.models.tensors import finite, tensors_in


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
    """Shape, dtype and device of every tensor among the arguments of a call."""
    return tuple((t.shape, t.dtype, t.device) for t in tensors_in([args, kwargs]))
