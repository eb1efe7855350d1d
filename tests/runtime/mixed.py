"""A small pipeline, and a plan for it with every kind of cell."""

from __future__ import annotations

import gc

import torch

from tests.models.zoo import build
from tests.runtime.harness import LoopPipeline, group, step

STEPS = 6
LIST = "transformer_blocks"
MIXED = [
    step("###0##", [(), (), (0.2,), (), (), (0.1, 0.0, -0.1)]),
    group(LIST, 0, 2, "##1.1#", [(), (), (), (), (0.4,), ()]),
    group(LIST, 2, 4, "##0.#4", [(), (), (), (), (), (0.2, -0.3)]),
]


def pipeline(seed: int = 0) -> LoopPipeline:
    """Four blocks of Qwen-Image, guided in two calls a step."""
    return LoopPipeline(*build("QwenImageTransformer2DModel", seed))


def tensors() -> int:
    """How many tensors are alive."""
    gc.collect()
    return sum(1 for thing in gc.get_objects() if type(thing) is torch.Tensor)
