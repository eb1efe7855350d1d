"""The few tensor operations of a prediction, safe in half precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_HALF_MAX = torch.finfo(torch.float16).max


def predict(anchor: Tensor, base: Tensor | None, weight: float) -> Tensor:
    """`anchor + weight (anchor - base)`, or the anchor itself where there is nothing to add.

    One `lerp`: it reads both tensors once and, in half precision, accumulates in float32.
    """
    if base is None or weight == 0.0:
        return anchor
    return _finite(torch.lerp(base, anchor, 1.0 + weight))


def mean_velocity(value: Tensor, others: Sequence[Tensor], taps: Sequence[float]) -> Tensor:
    """`value + sum of taps (value - other)`, accumulated in float32 at least."""
    wide = torch.promote_types(value.dtype, torch.float32)
    result = value.to(wide) * (1.0 + sum(taps))
    for other, tap in zip(others, taps, strict=True):
        result = result.add_(other.to(result), alpha=-tap)
    return _finite(result.to(value.dtype))


def difference(after: Tensor, before: Tensor) -> Tensor:
    """`after - before`, on the device of `after`."""
    return _finite(after - before.to(after.device))


def add(stream: Tensor, residual: Tensor) -> Tensor:
    """`stream + residual`, in the dtype of the stream and on the device of the residual."""
    return _finite(stream.to(residual.device) + residual.to(stream.dtype))


def copied(output: Any) -> Any:
    """A model output of the same type whose tensors are detached copies."""
    if isinstance(output, Tensor):
        return output.detach().clone()
    if isinstance(output, dict):
        # diffusers' outputs are dataclasses that are dictionaries too.
        return type(output)(**{key: copied(value) for key, value in output.items()})
    if isinstance(output, (tuple, list)):
        values = [copied(value) for value in output]
        return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
    return output


def tensor_bytes(output: Any) -> int:
    """Bytes of all tensors in a model output."""
    if isinstance(output, Tensor):
        return output.nbytes
    if isinstance(output, dict):
        return sum(tensor_bytes(value) for value in output.values())
    if isinstance(output, (tuple, list)):
        return sum(tensor_bytes(value) for value in output)
    return 0


def signature(args: Any, kwargs: Any) -> tuple[Any, ...]:
    """Shape, dtype and device of every tensor among the arguments of a call."""
    return tuple(_described(value) for value in (*args, *kwargs.values()) if value is not None)


def device_of(args: Any, kwargs: Any) -> torch.device | None:
    """The device of the first tensor among the arguments of a call."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, (list, tuple)) and value:
            value = value[0]
        if isinstance(value, Tensor):
            return value.device
    return None


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    if isinstance(value, dict):
        return tuple((key, _described(item)) for key, item in value.items())
    if isinstance(value, (tuple, list)):
        return tuple(_described(item) for item in value)
    return None


def _finite(value: Tensor) -> Tensor:
    # float16 ends at 65504, which large models reach; the models clip there themselves.
    if value.dtype is torch.float16:
        return value.clamp_(-_HALF_MAX, _HALF_MAX)
    return value
