"""`check_adapter`: whether an adapter tells the truth about a model, on the model itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layercache.errors import UnsupportedModelError
from layercache.models.adapters import BlockList, adapter_for, blocks_of, check_signature
from layercache.models.clock import Clock
from layercache.models.gates import Gate
from layercache.models.tensors import tensors_in
from layercache.plan import UnitPlan
from layercache.runtime._groups import Branch, GroupRunner
from layercache.runtime._trace import Trace

_CPU = torch.device("cpu")
_SIGMAS = (1.0, 0.5, 0.0)
_BRANCH: Branch = (None, 0)


def check_adapter(transformer: nn.Module, *args: Any, **kwargs: Any) -> dict[str, float]:
    """Check a transformer's adapter against calls of the transformer with these arguments.

    One call is traced: which blocks run, in which order, with what shapes, under which names. Then
    each block list is skipped with the residuals that it has just had, which must give the same
    output, and each block by itself.

    Args:
        transformer: A model that an adapter is registered for.
        args: Arguments of one call, as a pipeline makes it.
        kwargs: Its keyword arguments.

    Returns:
        By block list, the largest deviation of the output, relative to its largest value. In
        float32 it is about 1e-6.

    Raises:
        UnsupportedModelError: The adapter is missing or wrong; the message says what to correct.

    Example:
        >>> check_adapter(transformer, **inputs)  # doctest: +SKIP
        {'blocks': 2.1e-07}
    """
    adapter = adapter_for(transformer)
    found: dict[str, float] = {}
    with torch.no_grad():
        names = [block_list.name for block_list in adapter.block_lists]
        with Trace(transformer, adapter, names).watching():
            expected = tensors_in(transformer(*args, **kwargs))
        tolerance = max(100 * torch.finfo(tensor.dtype).eps for tensor in expected)
        for block_list in adapter.block_lists:
            count = len(blocks_of(transformer, block_list))
            spans = [(0, count), *((i, i + 1) for i in range(count))]
            worst = 0.0
            for span in dict.fromkeys(spans):
                with _skipping(transformer, block_list, span) as runner:
                    for step in range(2):
                        runner.begin(step, _BRANCH)
                        output = tensors_in(transformer(*args, **kwargs))
                        runner.end()
                        worst = max(worst, _deviation(output, expected))
                if not worst <= tolerance:
                    raise UnsupportedModelError(
                        f"blocks {span[0]}:{span[1]} of {block_list.name!r}, skipped with their "
                        f"own residuals, change the output of {type(transformer).__name__} by "
                        f"{worst:.2g} of its largest value (at most {tolerance:.1g}): a block has "
                        "a further stream, or depends on more than the block before it"
                    )
            found[block_list.name] = worst
    return found


@contextmanager
def _skipping(
    transformer: nn.Module, block_list: BlockList, span: tuple[int, int]
) -> Iterator[GroupRunner]:
    """A group of these blocks, computed at step 0 and reused at step 1."""
    first, stop = span
    unit = UnitPlan(kind="group", cells="#0", block_list=block_list.name, start=first, stop=stop)
    blocks, problems = blocks_of(transformer, block_list), list[str]()
    schedule = unit.schedule(_SIGMAS)
    runner = GroupRunner(unit, schedule, block_list, blocks, problems.append, Clock(_CPU))
    runner.begin_run()
    gates = []
    for block, handler in runner.handlers.items():
        check_signature(block_list, block)
        gates.append(Gate(block, handler, block_list.streams))
    try:
        for gate in gates:
            gate.install()
        yield runner
    finally:
        for gate in gates:
            gate.remove()
    if problems:
        raise UnsupportedModelError(f"{problems[0]}: call the model with no plan on it")


def _deviation(output: list[Tensor], expected: list[Tensor]) -> float:
    worst = 0.0
    for mine, theirs in zip(output, expected, strict=True):
        scale = max(theirs.abs().max().item(), torch.finfo(theirs.dtype).tiny)
        worst = max(worst, (mine - theirs).abs().max().item() / scale)
    return worst
