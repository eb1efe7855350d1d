"""Tensors are found, and mapped, in whatever a model takes or returns."""

from __future__ import annotations

import copy
from collections import namedtuple
from typing import Any

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from layercache.models.tensors import map_tensors, tensors_in
from layercache.runtime.arithmetic import signature

Pair = namedtuple("Pair", "sample aside")


class Named(dict[str, Any]):
    """A dictionary class of somebody's own."""


class Row(list[Any]):
    """A list class of somebody's own."""


@pytest.mark.parametrize(
    "made",
    [
        Transformer2DModelOutput(sample=torch.ones(2)),
        Named(sample=torch.ones(2), aside=None),
        Row([torch.ones(2), "text"]),
        Pair(torch.ones(2), 3),
    ],
    ids=lambda made: type(made).__name__,
)
def test_every_container_is_entered_and_kept(made: Any) -> None:
    assert [tensor.tolist() for tensor in tensors_in([made])] == [[1.0, 1.0]]
    doubled = map_tensors(lambda tensor: 2 * tensor, {"out": (made,)})["out"][0]
    assert type(doubled) is type(made)
    assert [tensor.tolist() for tensor in tensors_in(doubled)] == [[2.0, 2.0]]
    assert tensors_in(made)[0].tolist() == [1.0, 1.0]


def test_a_call_is_told_by_its_tensors_and_where_they_stand() -> None:
    image, text = torch.ones(1, 4), torch.ones(1, 3)
    known = signature((image,), {"text": text, "extra": {"scale": 0.5}, "timestep": 0.1})
    assert known == signature(
        (copy.deepcopy(image),), {"text": text, "extra": {"scale": 0.9}, "timestep": 0.2}
    )
    for args, text_, extra in (
        ((image.half(),), text, {"scale": 0.5}),
        ((image,), torch.ones(1, 5), {"scale": 0.5}),
        ((image,), text, {"gain": 0.5}),
        ((image,), [text], {"scale": 0.5}),
    ):
        assert signature(args, {"text": text_, "extra": extra, "timestep": 0.1}) != known
