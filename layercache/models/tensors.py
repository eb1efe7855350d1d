"""Tensors within the arguments and outputs of models, whatever containers hold them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_HALF_MAX = torch.finfo(torch.float16).max


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """The same tuples, lists, dictionaries and model outputs around `function` of every tensor.

    Example:
        >>> map_tensors(lambda tensor: tensor.shape[0], {"a": [torch.ones(2), None]})
        {'a': [2, None]}
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        items = {name: map_tensors(function, item) for name, item in value.items()}
        # diffusers' outputs are dataclasses that are dictionaries too.
        return items if type(value) is dict else type(value)(**items)
    if isinstance(value, tuple | list):
        values = [map_tensors(function, item) for item in value]
        return type(value)(*values) if hasattr(value, "_fields") else type(value)(values)
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of a value, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, value)
    return found


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors of a value."""
    return sum(tensor.nbytes for tensor in tensors_in(value))


def finite(tensor: Tensor) -> Tensor:
    """Clipped in place to what float16 holds, as large models do themselves."""
    return tensor.clamp_(-_HALF_MAX, _HALF_MAX) if tensor.dtype is torch.float16 else tensor
