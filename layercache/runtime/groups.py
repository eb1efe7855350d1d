"""One group of blocks: measures its residual where it is computed, adds it where it is predicted.

The reference is: *the predicted residual, added to what the model itself would add*. Models may
add to the streams between two blocks (a ControlNet, a text that is appended again). Those additions
are not part of the residual, since the model repeats them when the group is skipped:

    r = sum over uninterrupted segments of (last output - first input)

which is the tail's output minus the head's input when nothing is injected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from typing import Any

from torch import Tensor, nn

from layercache.errors import UnsupportedModelError
from layercache.models._foreign import changes_of
from layercache.models.adapters import (
    BlockList,
    check_shapes,
    read_outputs,
    read_streams,
    write_outputs,
)
from layercache.models.gates import Call, Handler
from layercache.plan import Schedule
from layercache.runtime.arithmetic import add, difference, predict
from layercache.runtime.offloading import Transfers, shared_transfers
from layercache.runtime.timing import Clock, Mark

Streams = dict[str, Tensor]
Branch = tuple[str | None, int]
"""Name of the cache context and ordinal of the call under that name within one step."""


class Mode(Enum):
    """What a group does during the forward under way."""

    COMPUTE = 0
    STORE = 1
    PREDICT = 2


class GroupRunner:
    """State of one group. `begin` is called before each forward of the model, `end` after it.

    A group that the plan never predicts is not `gated`: nothing of it is ever read, so only its
    first and last block are watched, for the time that they take.
    """

    def __init__(
        self,
        name: str,
        block_list: BlockList,
        schedule: Schedule,
        span: tuple[int, int],
        on_problem: Callable[[str], None],
        clock: Clock,
    ) -> None:
        self.name = name
        self.schedule = schedule
        self.first, self.stop = span
        self.gated = any(schedule.cached)
        self.held_bytes = 0
        self.bytes_per_refresh: dict[Branch, int] = {}
        self.peak_bytes: dict[Branch, int] = {}
        self.marks: tuple[Mark, Mark] = (None, None)
        self.transfers: Transfers = {}
        self._clock = clock
        self._block_list = block_list
        self._on_problem = on_problem
        self._held: dict[Branch, dict[int, Streams]] = {}
        self._mode = Mode.COMPUTE
        self._step = -1
        self._branch: Branch = (None, 0)
        self._residual: Streams = {}
        self._position = -1
        self._calls = 0
        self._segment: Streams | None = None
        self._last: Streams = {}
        self._versions: dict[str, int | None] = {}
        self._sum: Streams = {}

    # -- decisions, once per forward -----------------------------------------------------------

    def begin_run(self, blocks: Sequence[nn.Module]) -> None:
        """Start counting bytes anew; the model's offloading may have changed since the last run."""
        self.bytes_per_refresh.clear()
        self.peak_bytes.clear()
        if self.gated:
            self.transfers = shared_transfers(blocks, self.first, self.stop)

    def begin(self, step: int, branch: Branch) -> None:
        """Set what the blocks do in this forward."""
        schedule = self.schedule
        self._step, self._branch = step, branch
        self._position, self._calls, self._segment = -1, 0, None
        self._last, self._sum, self._residual = {}, {}, {}
        self.marks = (None, None)
        self._mode = Mode.COMPUTE
        if schedule.refresh[step]:
            if schedule.last_use[step] > step:
                self._mode = Mode.STORE
        elif schedule.cached[step]:
            held = self._held.get(branch, {})
            weight = schedule.weight[step]
            anchor = held.get(schedule.anchor[step])
            base = held.get(schedule.base[step]) if weight else None
            if anchor is None or (weight and base is None):
                self._on_problem(f"{self.name}: what step {step} predicts from was not stored")
                return
            base = base or {}
            self._residual = {n: predict(r, base.get(n), weight) for n, r in anchor.items()}
            self._mode = Mode.PREDICT

    def end(self) -> bool | None:
        """Close the forward: True if it computed the group, False if predicted, None if not run."""
        mode, called = self._mode, self._calls > 0
        if mode is Mode.STORE and called:
            self._store()
        self.cancel()
        if not called:
            return None
        return mode is not Mode.PREDICT

    def cancel(self) -> None:
        """Forget the forward under way; the blocks compute as if there were no plan."""
        self._mode = Mode.COMPUTE
        self._segment, self._last, self._sum, self._residual = None, {}, {}, {}

    # -- the blocks ----------------------------------------------------------------------------

    @property
    def positions(self) -> list[int]:
        """Positions in the list of the blocks that need a gate."""
        if self.gated:
            return list(range(self.first, self.stop))
        return sorted({self.first, self.stop - 1})

    def handler(self, block: nn.Module, position: int) -> Handler:
        """The gate handler of the block at `position` of the list."""
        return partial(self.call, block, position)

    def call(
        self,
        block: nn.Module,
        position: int,
        inner: Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """What the block at `position` of the list returns in the forward under way."""
        self._calls += 1
        if self._calls == 1:
            self.marks = (self._clock.mark(), None)
        if self._mode is Mode.COMPUTE:
            output = inner(*args, **kwargs)
        else:
            output = self._directed(block, position, inner, args, kwargs)
        if position == self.stop - 1:
            self.marks = (self.marks[0], self._clock.mark())
        return output

    def _directed(
        self,
        block: nn.Module,
        position: int,
        inner: Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if position <= self._position:
            raise UnsupportedModelError(
                f"block {position} of {self._block_list.name!r} was called after block "
                f"{self._position} in one forward; blocks of a group must run once, in order"
            )
        self._position = position
        if self._mode is Mode.STORE:
            return self._measured(block, inner, args, kwargs)
        if self.transfers and position in self.transfers:
            self.transfers[position]()
        return self._predicted(block, inner, args, kwargs)

    def _predicted(
        self, block: nn.Module, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        streams = read_streams(self._block_list, block, args, kwargs)
        if self._residual:
            for name, residual in self._residual.items():
                if name not in streams or streams[name].shape != residual.shape:
                    self._on_problem(f"{self.name}: stream {name!r} changed shape within a run")
                    self._mode = Mode.COMPUTE
                    return inner(*args, **kwargs)
            streams = {
                name: add(stream, self._residual[name]) if name in self._residual else stream
                for name, stream in streams.items()
            }
            self._residual = {}
        return write_outputs(self._block_list, block, streams)

    def _measured(
        self, block: nn.Module, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        streams = read_streams(self._block_list, block, args, kwargs)
        if self._segment is None:
            self._segment = streams
        elif not self._continues(streams):
            self._close_segment()
            self._segment = streams
        versions = {name: changes_of(tensor) for name, tensor in streams.items()}
        output = inner(*args, **kwargs)
        self._last = read_outputs(self._block_list, output)
        self._check(block, streams, versions)
        self._versions = {name: changes_of(tensor) for name, tensor in self._last.items()}
        if self._block_list.in_place or None in self._versions.values():
            self._close_segment()
        return output

    def _continues(self, streams: Streams) -> bool:
        """Whether a block's inputs are the outputs of the block before, unchanged."""
        for name, tensor in self._last.items():
            given = streams.get(name)
            if given is tensor and changes_of(given) != self._versions[name]:
                raise UnsupportedModelError(
                    f"something wrote into the output {name!r} of a block of "
                    f"{self._block_list.name!r} before the next block ran: declare the list with "
                    "in_place=True in its adapter"
                )
            if given is not tensor:
                return False
        return True

    def _check(self, block: nn.Module, streams: Streams, versions: dict[str, int | None]) -> None:
        check_shapes(block, streams, self._last)
        for name, version in versions.items():
            if changes_of(streams[name]) != version:
                raise UnsupportedModelError(
                    f"{type(block).__name__} writes into its own input {name!r}, so the group's "
                    "residual cannot be measured: such a model is not supported"
                )

    def _close_segment(self) -> None:
        if self._segment is None:
            return
        for name, tensor in self._last.items():
            delta = difference(tensor, self._segment[name])
            if name in self._sum:
                delta = add(self._sum[name], delta)
            self._sum[name] = delta
        for name in set(self._sum) - set(self._last):
            # The last block no longer returns this stream, so nobody reads it from here on.
            del self._sum[name]
        self._segment = None

    # -- what is held --------------------------------------------------------------------------

    def _store(self) -> None:
        self._close_segment()
        size = sum(tensor.nbytes for tensor in self._sum.values())
        self._held.setdefault(self._branch, {})[self._step] = {
            name: tensor.detach() for name, tensor in self._sum.items()
        }
        self.bytes_per_refresh[self._branch] = size
        self.held_bytes += size
        held = sum(
            t.nbytes for streams in self._held[self._branch].values() for t in streams.values()
        )
        self.peak_bytes[self._branch] = max(self.peak_bytes.get(self._branch, 0), held)

    def finish_step(self, step: int) -> None:
        """Free what no step after `step` reads."""
        for held in self._held.values():
            for stored in [s for s in held if self.schedule.last_use[s] <= step]:
                self.held_bytes -= sum(tensor.nbytes for tensor in held.pop(stored).values())

    def flush(self, branch: Branch | None = None) -> None:
        """Drop what is held, of one branch or of all."""
        if branch is None:
            self._held.clear()
            self.held_bytes = 0
            return
        for streams in self._held.pop(branch, {}).values():
            self.held_bytes -= sum(tensor.nbytes for tensor in streams.values())
