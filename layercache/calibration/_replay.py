"""A transformer whose calls can be recorded, and replayed with residuals of earlier steps.

While attached, gates stand on every grouped block. A *recorded* call runs as it is, and every
group's output streams and residual are noted. A *replay* of it returns what was recorded for the
groups before g, adds a residual of an earlier step to the input of group g, and computes the groups
after g, but for those that are replaced along with it; replays of several lags run as one larger
batch.

A group is, in each call, the blocks of it that the model calls there: skip-layer guidance leaves
some out. Residuals of the current step and of the `lags` steps before it are held, and outputs of
the call under way. Both move to the CPU where `offload` is set, and come back when a replay reads
them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from layercache.calibration._timing import StepTimes
from layercache.models._foreign import execution_device
from layercache.models.adapters import (
    Adapter,
    BlockList,
    blocks_of,
    read_streams,
    write_outputs,
)
from layercache.models.clock import Clock, Mark
from layercache.models.gates import Call, Gate
from layercache.models.measuring import ResidualMeter, Streams
from layercache.models.tensors import finite, map_tensors, tensor_bytes, tensors_in
from layercache.stats import Group

Shape = tuple[Any, ...]
"""What two calls must share so that one can read residuals of the other."""


@dataclass
class _Part:
    """What one group did in the call under way."""

    meter: ResidualMeter
    positions: list[int] = field(default_factory=list)
    elements: int = 0
    shapes: list[Any] = field(default_factory=list)
    outputs: Streams = field(default_factory=dict)
    started: Mark = None
    ended: Mark = None


@dataclass(frozen=True)
class RecordedCall:
    """One call of the transformer, until the next one is recorded.

    Attributes:
        shape: What calls of other steps must have in common with it.
        elements: (G+1,) elements of the streams that entered blocks, by group, then those of the
            output: the work that it was.
    """

    step: int
    number: int
    inner: Call
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    shape: Shape
    elements: tuple[int, ...]
    parts: tuple[_Part, ...]


class ReplayableTransformer:
    """Attach to a transformer; `remove` takes every gate off and drops all that is held.

    Args:
        transformer: The model.
        adapter: Its adapter.
        groups: The groups to record and replace.
        lags: How many steps back residuals are kept.
        offload: Keep what is held on the CPU.

    Attributes:
        times: The spans of every recorded call and group.
    """

    def __init__(
        self,
        transformer: nn.Module,
        adapter: Adapter,
        groups: tuple[Group, ...],
        lags: int,
        offload: bool = False,
    ) -> None:
        self.groups, self.lags, self.offload = groups, lags, offload
        self.device = device_of(transformer)
        self.times = StepTimes(Clock(self.device), len(groups))
        self._lists = [adapter.block_list(group.block_list) for group in groups]
        self._parts: tuple[_Part, ...] | None = None
        self._replay: tuple[RecordedCall, dict[int, list[Streams]], int] | None = None
        # By call number and group: the residuals of recent steps.
        self._history: dict[tuple[int, int], dict[int, Streams]] = {}
        self._shapes: dict[tuple[int, int], Shape] = {}
        self._gates: list[Gate] = []
        for index, (group, block_list) in enumerate(zip(groups, self._lists, strict=True)):
            blocks = blocks_of(transformer, block_list)
            for position in range(group.start, group.stop):
                self._gates.append(self._gate(blocks[position], block_list, index, position))
        for gate in self._gates:
            gate.install()

    def remove(self) -> None:
        """Take the gates off, and drop what is held."""
        for gate in reversed(self._gates):
            gate.remove()
        # Gates know this object, a cycle that would keep tensors for long.
        self._gates.clear()
        self.clear()

    def clear(self) -> None:
        """Drop what is held of calls; times stay."""
        self._history.clear()
        self._shapes.clear()

    # -- the blocks ----------------------------------------------------------------------------

    def _gate(self, block: nn.Module, block_list: BlockList, index: int, position: int) -> Gate:
        def handle(inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._replay is not None:
                return self._replayed(block_list, block, index, position, inner, args, kwargs)
            if self._parts is None:
                return inner(*args, **kwargs)
            part = self._parts[index]
            if not part.positions:
                part.started = self.times.clock.mark()
            streams = read_streams(block_list, block, args, kwargs)
            part.positions.append(position)
            part.elements += sum(tensor.numel() for tensor in streams.values())
            part.shapes.append([(name, t.shape, t.dtype) for name, t in streams.items()])
            output = part.meter.run(block, inner, args, kwargs)
            part.ended = self.times.clock.mark()
            if block_list.in_place:
                # What was returned here changes when the model writes into it.
                part.outputs = {name: t.clone() for name, t in part.meter.outputs.items()}
            return output

        return Gate(block, handle)

    def _replayed(
        self,
        block_list: BlockList,
        block: nn.Module,
        index: int,
        position: int,
        inner: Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        assert self._replay is not None
        call, residuals, count = self._replay
        first = min(residuals)
        if index > first and index not in residuals:
            return inner(*args, **kwargs)
        positions = call.parts[index].positions
        if index < first and position == positions[-1]:
            # The last block, since what the model adds between two blocks is in this already.
            recorded = call.parts[index].outputs
            return write_outputs(
                block_list,
                {name: _repeat(tensor.to(self.device), count) for name, tensor in recorded.items()},
            )
        streams = read_streams(block_list, block, args, kwargs)
        if index in residuals and position == positions[0]:
            own = residuals[index]
            streams = {
                name: finite(
                    streams[name] + torch.cat([residual[name].to(self.device) for residual in own])
                )
                for name in own[0]
            }
        return write_outputs(block_list, streams)

    # -- calls ---------------------------------------------------------------------------------

    def record(
        self, step: int, number: int, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> RecordedCall:
        """Make call `number` of a step in full and note its groups' streams."""
        parts = tuple(_Part(ResidualMeter(block_list)) for block_list in self._lists)
        clock, self._parts = self.times.clock, parts
        started = clock.mark()
        try:
            output = inner(*args, **kwargs)
        finally:
            self._parts = None
        ended = clock.mark()
        self.times.call(started, ended)
        for index, part in enumerate(parts):
            if part.positions:
                self.times.group(index, part.started, part.ended)
                part.outputs = self._away(part.outputs or part.meter.outputs)
            self._keep(step, number, index, part)
        # All tensors, since some models return a list with one an image.
        outputs = tensors_in(output)
        elements = (*(part.elements for part in parts), sum(t.numel() for t in outputs))
        made = tuple(tensor.shape for tensor in outputs)
        shape = (
            made, *((tuple(part.positions), tuple(map(tuple, part.shapes))) for part in parts)
        )  # fmt: skip
        self.times.aside(ended, clock.mark())
        return RecordedCall(step, number, inner, args, kwargs, output, shape, elements, parts)

    def _keep(self, step: int, number: int, index: int, part: _Part) -> None:
        key = (number, index)
        shape = (tuple(part.positions), tuple(map(tuple, part.shapes)))
        if self._shapes.get(key) != shape:
            self._shapes[key], self._history[key] = shape, {}
        history = self._history[key]
        history[step] = self._away(part.meter.residual())
        for old in [earlier for earlier in history if earlier < step - self.lags]:
            del history[old]

    @property
    def _moves(self) -> bool:
        return self.offload and self.device.type != "cpu"

    def _away(self, streams: Streams) -> Streams:
        return {n: t.cpu() for n, t in streams.items()} if self._moves else streams

    def replay(self, call: RecordedCall, groups: Sequence[int], lags: Sequence[int]) -> list[Any]:
        """The call's output with some groups predicted from each of `lags` steps ago.

        Several lags run as one batch. Returns one output a lag, of the model's own type.
        """
        residuals = {
            group: [self._history[call.number, group][call.step - lag] for lag in lags]
            for group in groups
            if call.parts[group].positions
        }
        if not residuals:
            return [call.output] * len(lags)  # this call leaves the groups out
        size, count = _first_tensor(call.output).shape[0], len(lags)
        self._replay = (call, residuals, count)
        try:
            output = call.inner(
                *_repeat_batch(call.args, size, count), **_repeat_batch(call.kwargs, size, count)
            )
        finally:
            self._replay = None
        if count == 1:
            return [output]
        rows = [slice(at * size, (at + 1) * size) for at in range(count)]
        return [map_tensors(operator.itemgetter(row), output) for row in rows]

    def available(
        self, call: RecordedCall, groups: Sequence[int], lags: Sequence[int]
    ) -> list[int]:
        """Those of `lags` at which this call's residuals of the groups are held."""
        histories = [self._history[call.number, group] for group in groups]
        return [lag for lag in lags if all(call.step - lag in history for history in histories)]

    def batches_repeat(self, call: RecordedCall, tolerance: float = 1e-2) -> bool:
        """Whether a batch repeated twice gives the recorded output twice, so that lags can batch.

        The test catches arguments that a repetition by their leading size gets wrong.
        """
        expected = _first_tensor(call.output)
        size = expected.shape[0]
        try:
            output = _first_tensor(
                call.inner(
                    *_repeat_batch(call.args, size, 2), **_repeat_batch(call.kwargs, size, 2)
                )
            )
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False
        if output.shape[0] != 2 * size:
            return False
        error = (output - _repeat(expected, 2)).norm() / expected.norm().clamp_min(1e-12)
        return bool(error < tolerance)

    def residuals(self, step: int, group: int) -> list[tuple[int, Streams]]:
        """(call number, residual) of a group in every call of a step."""
        return [
            (number, history[step])
            for (number, index), history in sorted(self._history.items())
            if index == group and step in history
        ]

    def residual_bytes(self, step: int, group: int) -> int:
        """Bytes of one stored residual of a group, all calls, for the whole batch."""
        return sum(tensor_bytes(residual) for _, residual in self.residuals(step, group))

    def held_bytes(self, call: RecordedCall) -> int:
        """Bytes of all residuals and of a call's outputs that are held, wherever they are."""
        held = {
            id(tensor): tensor.nbytes
            for value in (
                *(part.outputs for part in call.parts),
                *(streams for history in self._history.values() for streams in history.values()),
            )
            for tensor in tensors_in(value)
        }
        return sum(held.values())


def device_of(module: nn.Module) -> torch.device:
    """Where a model computes."""
    # accelerate's hooks keep the weights of an offloaded model elsewhere and know the device.
    hooked = execution_device(module)
    if hooked is not None:
        return torch.device(hooked)
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _repeat(tensor: Tensor, count: int) -> Tensor:
    return tensor.repeat(count, *[1] * (tensor.ndim - 1))


def _repeat_batch(value: Any, size: int, count: int) -> Any:
    """Repeat all that has the batch's length, in the containers that arguments come in."""
    if count == 1:
        return value
    if isinstance(value, Tensor):
        return _repeat(value, count) if value.ndim and value.shape[0] == size else value
    if isinstance(value, dict):
        return {name: _repeat_batch(item, size, count) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_repeat_batch(item, size, count) for item in value)
    if isinstance(value, list):
        if any(isinstance(item, Tensor) for item in value) and len(value) != size:
            return [_repeat_batch(item, size, count) for item in value]
        return value * count if len(value) == size else value
    return value


def _first_tensor(output: Any) -> Tensor:
    return tensors_in(output)[0]
