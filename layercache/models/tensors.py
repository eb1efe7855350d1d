"""Tensors within the arguments and outputs of models, whatever containers hold them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from layercache.models._foreign import tree_leaves, tree_map_only

_HALF_MAX = torch.finfo(torch.float16).max


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """The same tuples, lists, dictionaries and model outputs around `function` of every tensor.

    Example:
        >>> map_tensors(lambda tensor: tensor.shape[0], {"a": [torch.ones(2), None]})
        {'a': [2, None]}
    """
    return tree_map_only(Tensor, function, value)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of a value, in order."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors of a value."""
    return sum(tensor.nbytes for tensor in tensors_in(value))


def finite(tensor: Tensor) -> Tensor:
    """Clipped in place to what float16 holds, as large models do themselves."""
    return tensor.clamp_(-_HALF_MAX, _HALF_MAX) if tensor.dtype is torch.float16 else tensor
