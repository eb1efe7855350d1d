"""`compile_blocks`: the blocks are compiled, the decisions stay eager."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from layercache.models._foreign import plain_call
from layercache.models.adapters import adapter_for, blocks_of
from layercache.models.gates import gate_of


def compile_blocks(transformer: nn.Module, **options: Any) -> int:
    """Compile every block that a plan may skip, before or after a plan is put on.

    A gate stays outside the compiled call, so a plan adds no graph and no recompilation, and
    `fullgraph=True` holds. `Module.compile` and diffusers' `compile_repeated_blocks` work too;
    after a plan was put on, they take effect for the gates at the start of the next run.

    Args:
        transformer: A supported model.
        options: As for `torch.compile`.

    A block in which context parallelism splits the sequence stays eager if a plan skips it.

    Returns:
        The number of blocks compiled.

    Raises:
        UnsupportedModelError: No adapter knows the model.

    Example:
        >>> compile_blocks(pipe.transformer, fullgraph=True)  # doctest: +SKIP
        32
    """
    count = 0
    for block_list in adapter_for(transformer).block_lists:
        for block in blocks_of(transformer, block_list):
            gate = gate_of(block)
            if gate is None:
                block.compile(**options)
            elif gate.within_split:
                continue
            else:
                gate.replace(torch.compile(plain_call(block), **options))
            count += 1
    return count
