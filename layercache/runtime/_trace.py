"""The first forward under a plan, watched: does the model do what its adapter says?

Watching costs a few comparisons a block, once. It sees what no signature shows: which lists run
and in which order, how many values a block returns, whether each has the shape of its stream, and,
since the tensors that one block returns are the very tensors that the next one takes, whether they
are declared in the right order.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from layercache.errors import UnsupportedModelError
from layercache.models.adapters import (
    Adapter,
    BlockList,
    blocks_of,
    check_shapes,
    read_outputs,
    read_streams,
)
from layercache.models.gates import Call, Gate, Handler, splits_sequence


class Trace:
    """Watches one forward of a transformer."""

    def __init__(self, transformer: nn.Module, adapter: Adapter, lists: Sequence[str]) -> None:
        self._class_name = type(transformer).__name__
        self._lists = [block_list for block_list in adapter.block_lists if block_list.name in lists]
        self._gates = [
            Gate(block, self._handler(order, block_list, block, position))
            for order, block_list in enumerate(self._lists)
            for position, block in enumerate(blocks_of(transformer, block_list))
        ]
        self._at = (-1, -1)
        self._called: set[str] = set()
        self._last: dict[str, Tensor] = {}
        # Weak, so that watching does not keep the outputs of all blocks in memory.
        self._returned: dict[int, weakref.ref[Tensor]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the forward that is made within.

        Raises:
            UnsupportedModelError: The adapter is wrong; the message says what to correct.
        """
        try:
            for gate in self._gates:
                gate.install()
            yield
        finally:
            for gate in self._gates:
                gate.remove()
        for block_list in self._lists:
            if block_list.name not in self._called:
                raise UnsupportedModelError(
                    f"{self._class_name} ran without calling a block of {block_list.name!r}: a "
                    "plan would change nothing there; correct the adapter's block lists"
                )

    def _handler(
        self, order: int, block_list: BlockList, block: nn.Module, position: int
    ) -> Handler:
        def handle(inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            streams = read_streams(block_list, block, args, kwargs)
            self._check_order(order, block_list, position)
            self._check_names(block_list, streams)
            self._check_connections(block_list, position, streams, (*args, *kwargs.values()))
            output = inner(*args, **kwargs)
            outputs = read_outputs(block_list, output)
            if not splits_sequence(block, block_list.streams):
                check_shapes(block, streams, outputs)
            self._last = outputs
            for tensor in outputs.values():
                self._returned[id(tensor)] = weakref.ref(tensor)
            return output

        return handle

    def _check_order(self, order: int, block_list: BlockList, position: int) -> None:
        if (order, position) <= self._at:
            before = self._lists[self._at[0]].name
            raise UnsupportedModelError(
                f"block {position} of {block_list.name!r} ran after block {self._at[1]} of "
                f"{before!r}: block lists run once, in the order in which the adapter declares them"
            )
        if order != self._at[0]:
            # What a whole list returns is there, predicted or not, for the lists that follow.
            self._last = {}
            self._returned.clear()
        self._at = (order, position)
        self._called.add(block_list.name)

    def _check_connections(
        self,
        block_list: BlockList,
        position: int,
        streams: dict[str, Tensor],
        values: Sequence[Any],
    ) -> None:
        taken = {id(tensor) for tensor in streams.values()}
        for value in values:
            returned = self._returned.get(id(value))
            if returned is not None and returned() is value and id(value) not in taken:
                raise UnsupportedModelError(
                    f"block {position} of {block_list.name!r} is given what an earlier block "
                    "returned, besides its streams: a skip of that block would take it away, so "
                    "that such a model is not supported"
                )

    def _check_names(self, block_list: BlockList, streams: dict[str, Tensor]) -> None:
        for name, tensor in streams.items():
            if not isinstance(tensor, Tensor):
                raise UnsupportedModelError(
                    f"{name!r}, declared as a stream of {block_list.name!r}, is a "
                    f"{type(tensor).__name__} and no tensor: correct the adapter's streams"
                )
            for other, output in self._last.items():
                if tensor is output and other != name and streams.get(other) is not output:
                    raise UnsupportedModelError(
                        f"what a block of {block_list.name!r} returns as {other!r}, says the "
                        f"adapter, enters the next block as {name!r}: correct the order of the "
                        "adapter's outputs"
                    )
