"""Blocks that see no timestep: computed once a generation, then answered with what they gave.

Their output follows from their arguments alone, and those are made of the prompt, the same at
every step. Nothing is predicted here: what a block gave is returned again only where all its
arguments are equal to those that it was given then, so images are bit-identical.

Arguments are kept as copies and outputs are kept and returned as copies, since a model may write
into either. Comparing them is a decision by data, which the processes of one parallel run could
make differently and then wait for each other for ever: there such blocks run as without a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from layercache.models.gates import Call, Handler
from layercache.models.tensors import map_tensors, tensor_bytes
from layercache.runtime._groups import Branch
from layercache.runtime._offloading import shared_transfers

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


class TimelessBlocks:
    """What the blocks gave in the run under way.

    Attributes:
        handlers: What the gates of the blocks do, by block.
        computed: Calls of this run that were computed.
        reused: Calls of this run that were answered.
        held_bytes: Bytes of all tensors held now.
        peak_bytes: The most that were held in this run.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        self.handlers: dict[nn.Module, Handler] = {b: partial(self._call, b) for b in blocks}
        self.computed = self.reused = self.held_bytes = self.peak_bytes = 0
        self._transfers: dict[nn.Module, list[Callable[[], None]]] = {}
        self._branch: Branch | None = None
        self._scales: Any = None
        self._apart = False
        self._kept: dict[Branch, dict[nn.Module, tuple[Any, Any]]] = {}

    def begin_run(self) -> None:
        """Start counting anew; the model's offloading may have changed since the last run."""
        self.computed = self.reused = self.peak_bytes = 0
        self._apart = _several_processes()
        self._transfers = {
            block: shared_transfers([block], range(1)).get(0, []) for block in self.handlers
        }

    @contextmanager
    def during(self, branch: Branch, kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Within it the blocks are called by a forward of the model with these arguments.

        All other forwards, of runs that are computed in full, leave them alone.
        """
        self._branch = branch
        # diffusers scales LoRA layers by one of these for the length of a forward.
        self._scales = [v for name, v in kwargs.items() if name.endswith("attention_kwargs")]
        try:
            yield
        finally:
            self._branch = None

    def _call(
        self, block: nn.Module, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What the block returns in the forward under way."""
        # In training dropout draws anew.
        if self._branch is None or self._apart or block.training:
            return inner(*args, **kwargs)
        given = (args, kwargs, self._scales)
        kept = self._kept.setdefault(self._branch, {})
        if block in kept and equal(kept[block][0], given):
            self.reused += 1
            for transfer in self._transfers.get(block, ()):
                transfer()
            return map_tensors(_copy, kept[block][1])
        self.computed += 1
        before = map_tensors(_copy, given)
        output = inner(*args, **kwargs)
        self.held_bytes -= tensor_bytes(kept.pop(block, ()))
        # What writes into its arguments does more than return something.
        if equal(before, given):
            kept[block] = (before, map_tensors(_copy, output))
            self.held_bytes += tensor_bytes(kept[block])
            self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        return output

    def flush(self, branch: Branch | None = None) -> None:
        """Drop what is held, of one branch or of all."""
        if branch is None:
            self._kept.clear()
            self.held_bytes = 0
            return
        self.held_bytes -= tensor_bytes(list(self._kept.pop(branch, {}).values()))


def equal(kept: Any, given: Any) -> bool:
    """Whether two values are alike: tensors by type, shape, dtype, device and every element.

    What is neither a tensor nor plain, nor holds only such, equals nothing. NaN does not either.
    """
    if type(kept) is not type(given):
        return False
    if isinstance(kept, Tensor):
        alike = (kept.shape, kept.dtype, kept.device) == (given.shape, given.dtype, given.device)
        return alike and not kept.is_meta and torch.equal(kept, given)
    if isinstance(kept, dict):
        return list(kept) == list(given) and equal(list(kept.values()), list(given.values()))
    if isinstance(kept, tuple | list):
        return len(kept) == len(given) and all(map(equal, kept, given))
    return isinstance(kept, _PLAIN) and kept == given


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _several_processes() -> bool:
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )
