"""One group of blocks: measures its residual where it is computed, adds it where it is predicted.

At a cached cell t with anchor a, for every stream and branch by itself,

    r_t = r_a + sum_h b_h (r_a - r_{a_h}),

the pairs (a_h, b_h) from the plan. The reference is: *the predicted residual, added to what the
model itself would add* between its blocks (`models.measuring`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from typing import Any

from torch import nn

from layercache.errors import UnsupportedModelError
from layercache.models.adapters import BlockList, read_streams, write_outputs
from layercache.models.clock import Clock, Mark
from layercache.models.gates import Call, Handler
from layercache.models.measuring import ResidualMeter, Streams
from layercache.models.tensors import tensor_bytes
from layercache.plan import Schedule, UnitPlan
from layercache.runtime._offloading import Transfers, shared_transfers
from layercache.runtime.arithmetic import add, affine

Branch = tuple[str | None, int]
"""Name of the cache context and ordinal of the call under that name within one step."""


class Mode(Enum):
    """What a group does during the forward under way."""

    COMPUTE = 0
    STORE = 1
    PREDICT = 2


def gate_positions(unit: UnitPlan, schedule: Schedule) -> Sequence[int]:
    """Positions of the blocks of a group that need a gate: all, or where nothing is cached two."""
    positions = unit.positions
    return positions if any(schedule.cached) else sorted({positions[0], positions[-1]})


class GroupRunner:
    """State of one group. `begin` is called before each forward of the model, `end` after it.

    Of a group that the plan never predicts nothing is ever read, so only its first and last block
    are watched, for the time that they take.

    Attributes:
        handlers: What the gates of its blocks do, by block.
    """

    def __init__(
        self,
        unit: UnitPlan,
        schedule: Schedule,
        block_list: BlockList,
        blocks: Sequence[nn.Module],
        on_problem: Callable[[str], None],
        clock: Clock,
    ) -> None:
        self.name = unit.name
        self.schedule = schedule
        self.handlers: dict[nn.Module, Handler] = {
            blocks[position]: partial(self._call, blocks[position], position)
            for position in gate_positions(unit, schedule)
        }
        self.held_bytes = 0
        self.bytes_per_value: dict[Branch, int] = {}
        self.peak_bytes: dict[Branch, int] = {}
        self.marks: tuple[Mark, Mark] = (None, None)
        self._transfers: Transfers = {}
        self._clock = clock
        self._block_list = block_list
        self._blocks = blocks
        self._positions = unit.positions
        self._on_problem = on_problem
        self._held: dict[Branch, dict[int, Streams]] = {}
        self._mode = Mode.COMPUTE
        self._step = -1
        self._branch: Branch = (None, 0)
        self._residual: Streams = {}
        self._position = -1
        self._calls = 0
        self._meter: ResidualMeter | None = None

    # -- decisions, once per forward -----------------------------------------------------------

    def begin_run(self) -> None:
        """Start counting bytes anew; the model's offloading may have changed since the last run."""
        self.bytes_per_value.clear()
        self.peak_bytes.clear()
        if any(self.schedule.cached):
            self._transfers = shared_transfers(self._blocks, self._positions)

    def begin(self, step: int, branch: Branch) -> None:
        """Set what the blocks do in this forward."""
        schedule = self.schedule
        self._step, self._branch = step, branch
        self._position, self._calls = -1, 0
        self.cancel()
        self.marks = (None, None)
        if schedule.last_use[step] > step:
            self._mode = Mode.STORE
            self._meter = ResidualMeter(self._block_list)
        elif schedule.cached[step]:
            self._predict(self._held.get(branch, {}))

    def _predict(self, held: dict[int, Streams]) -> None:
        anchor, reads = self.schedule.anchor[self._step], self.schedule.reads[self._step]
        if any(source not in held for source in (anchor, *(source for source, _ in reads))):
            self._on_problem(f"{self.name}: what step {self._step} predicts from was not stored")
            return
        for name, residual in held[anchor].items():
            # A stream that an earlier value lacks is not read by it either.
            pairs = [(held[s][name], tap) for s, tap in reads if name in held[s]]
            earlier = [tensor for tensor, _ in pairs]
            self._residual[name] = affine(residual, earlier, [tap for _, tap in pairs])
        self._mode = Mode.PREDICT

    def end(self) -> bool | None:
        """Close the forward: True if it computed the group, False if predicted, None if not run."""
        mode, called = self._mode, self._calls > 0
        if self._meter is not None and called:
            self._store(self._meter)
        self.cancel()
        if not called:
            return None
        return mode is not Mode.PREDICT

    def cancel(self) -> None:
        """Forget the forward under way; the blocks compute as if there were no plan."""
        self._mode = Mode.COMPUTE
        self._meter, self._residual = None, {}

    # -- the blocks ----------------------------------------------------------------------------

    def _call(
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
        if self._mode is not Mode.COMPUTE:
            self._check_order(position)
        if self._mode is Mode.COMPUTE:
            output = inner(*args, **kwargs)
        elif self._meter is not None:
            output = self._meter.run(block, inner, args, kwargs)
        else:
            for transfer in self._transfers.get(position, ()):
                transfer()
            output = self._predicted(block, inner, args, kwargs)
        if position == self._positions[-1]:
            self.marks = (self.marks[0], self._clock.mark())
        return output

    def _check_order(self, position: int) -> None:
        if position <= self._position:
            raise UnsupportedModelError(
                f"block {position} of {self._block_list.name!r} was called after block "
                f"{self._position} in one forward; blocks of a group must run once, in order"
            )
        self._position = position

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
        return write_outputs(self._block_list, streams)

    # -- what is held --------------------------------------------------------------------------

    def _store(self, meter: ResidualMeter) -> None:
        value = {name: tensor.detach() for name, tensor in meter.residual().items()}
        held = self._held.setdefault(self._branch, {})
        held[self._step] = value
        size = tensor_bytes(value)
        self.bytes_per_value[self._branch] = size
        self.held_bytes += size
        peak = max(self.peak_bytes.get(self._branch, 0), tensor_bytes(list(held.values())))
        self.peak_bytes[self._branch] = peak

    def finish_step(self, step: int) -> None:
        """Free what no step after `step` reads."""
        for held in self._held.values():
            for stored in [s for s in held if self.schedule.last_use[s] <= step]:
                self.held_bytes -= tensor_bytes(held.pop(stored))

    def flush(self, branch: Branch | None = None) -> None:
        """Drop what is held, of one branch or of all."""
        if branch is None:
            self._held.clear()
            self.held_bytes = 0
            return
        self.held_bytes -= tensor_bytes(self._held.pop(branch, {}))
