"""A transformer whose groups can be recorded, and replayed with residuals of earlier steps.

While attached, `forward` of the transformer and of every grouped block is replaced on the
instances. In *record* mode the model runs as it is, and every group's output streams and residual
are noted. In *replay* mode groups before g return what was recorded, group g returns its input plus
a residual of an earlier step, and the groups after g compute; replays of several lags run as one
larger batch.

Residuals of the current step and of the `lags` steps before it are held, and outputs of the current
one. Both move to the CPU where `offload` is set, and come back when a replay reads them.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from layercache.calibration.timing import Clock, StepTimes
from layercache.models.adapters import (
    Adapter,
    BlockList,
    blocks_of,
    read_outputs,
    read_streams,
    write_outputs,
)
from layercache.stats import Group

Streams = dict[str, Tensor]


@dataclass
class _Branch:
    """What is remembered of one of the step's transformer calls."""

    outputs: list[Streams]
    residuals: list[Streams]
    history: list[deque[Streams]]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None


class ReplayableTransformer:
    """Attach to a transformer; `remove` restores every `forward` and drops all that is held.

    Args:
        transformer: The model.
        adapter: Its adapter.
        groups: The groups to record and replace.
        lags: How many steps back residuals are kept.
        offload: Keep what is held on the CPU.

    Attributes:
        branches: What is remembered of each of a step's calls.
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
        self.transformer, self.groups, self.lags = transformer, groups, lags
        self.offload = offload
        self.device = device_of(transformer)
        self.branches: list[_Branch] = []
        self.times = StepTimes(Clock(self.device), len(groups))
        self._call: Callable[..., Any] = lambda *args, **kwargs: self.run(*args, **kwargs)
        self._branch: _Branch | None = None
        self._replay: tuple[int, list[Streams], int] | None = None
        self._entered: list[tuple[Any, Streams]] = [(None, {})] * len(groups)
        self._originals: list[tuple[nn.Module, bool, Any]] = []
        lists = {block_list.name: block_list for block_list in adapter.block_lists}
        self._root = transformer.forward
        self._patch(transformer, lambda *args, **kwargs: self._call(*args, **kwargs))
        for index, group in enumerate(groups):
            block_list = lists[group.block_list]
            blocks = blocks_of(transformer, block_list)
            for position in range(group.start, group.stop):
                self._patch_block(blocks[position], block_list, index, position)

    def on_call(self, function: Callable[..., Any]) -> None:
        """Make `function` answer the pipeline's transformer calls from here on."""
        self._call = function

    def remove(self) -> None:
        """Restore every `forward`, in reverse order, and drop what is held."""
        for module, had_own, original in reversed(self._originals):
            if had_own:
                module.forward = original
            else:
                del module.forward
        self._originals.clear()
        # Whoever answers the calls knows this object, a cycle that would keep tensors for long.
        self.branches.clear()
        self._call = self._root

    def _patch(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._originals.append((module, "forward" in vars(module), module.forward))
        module.forward = functools.wraps(module.forward)(forward)

    def _patch_block(
        self, block: nn.Module, block_list: BlockList, index: int, position: int
    ) -> None:
        group, original = self.groups[index], block.forward
        head, tail = position == group.start, position == group.stop - 1

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._replay is not None:
                return self._replayed(block_list, block, index, head, original, args, kwargs)
            branch = self._branch
            if branch is None:
                return original(*args, **kwargs)
            if head:
                streams = read_streams(block_list, block, args, kwargs)
                self._entered[index] = (self.times.clock.mark(), streams)
            output = original(*args, **kwargs)
            if tail:
                started, before = self._entered[index]
                self._entered[index] = (None, {})
                ended = self.times.clock.mark()
                self.times.group(index, started, ended)
                self._note(branch, index, before, read_outputs(block_list, output), block_list)
                self.times.noting(ended, self.times.clock.mark())
            return output

        self._patch(block, forward)

    def _note(
        self, branch: _Branch, index: int, before: Streams, after: Streams, block_list: BlockList
    ) -> None:
        residual = {name: after[name] - before[name] for name in after}
        if block_list.in_place and not self._moves:
            # What was returned here changes when the model writes into it.
            after = {name: tensor.clone() for name, tensor in after.items()}
        branch.residuals[index] = self._away(residual)
        branch.outputs[index] = self._away(after)

    @property
    def _moves(self) -> bool:
        return self.offload and self.device.type != "cpu"

    def _away(self, streams: Streams) -> Streams:
        return {n: t.cpu() for n, t in streams.items()} if self._moves else streams

    def _replayed(
        self,
        block_list: BlockList,
        block: nn.Module,
        index: int,
        head: bool,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        assert self._replay is not None and self._branch is not None
        target, residuals, count = self._replay
        if index > target:
            return original(*args, **kwargs)
        streams = read_streams(block_list, block, args, kwargs)
        if head and index < target:
            recorded = self._branch.outputs[index]
            streams = {
                name: _repeat(tensor.to(self.device), count) for name, tensor in recorded.items()
            }
        elif head:
            streams = {
                name: streams[name]
                + torch.cat([residual[name].to(self.device) for residual in residuals])
                for name in residuals[0]
            }
        return write_outputs(block_list, block, streams)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The transformer as it is, untouched and unrecorded."""
        self._branch = None
        return self._root(*args, **kwargs)

    def record(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run branch `number` of a step in full and note its groups' streams."""
        if number == len(self.branches):
            count = len(self.groups)
            history = [deque[Streams](maxlen=self.lags) for _ in range(count)]
            self.branches.append(_Branch([{}] * count, [{}] * count, history))
        branch = self.branches[number]
        self._branch = branch
        clock = self.times.clock
        started = clock.mark()
        try:
            branch.output = self._root(*args, **kwargs)
        finally:
            self._branch = None
        self.times.call(started, clock.mark())
        branch.args, branch.kwargs = args, kwargs
        return branch.output

    def end_step(self) -> None:
        """Move the recorded residuals into the history of the coming steps."""
        for branch in self.branches:
            for index, residual in enumerate(branch.residuals):
                branch.history[index].appendleft(residual)

    def end_run(self) -> None:
        """Drop everything held but the branches' outputs."""
        for branch in self.branches:
            count = len(self.groups)
            branch.outputs, branch.residuals = [{}] * count, [{}] * count
            for history in branch.history:
                history.clear()
            branch.args, branch.kwargs = (), {}

    def replay(self, number: int, group: int, lags: list[int]) -> list[Any]:
        """The branch's output with group `group` predicted from each of `lags` steps ago.

        Several lags run as one batch. Returns one output a lag, of the model's own type.
        """
        branch = self.branches[number]
        residuals = [branch.history[group][lag - 1] for lag in lags]
        size = _first_tensor(branch.output).shape[0]
        self._branch, self._replay = branch, (group, residuals, len(lags))
        try:
            output = self._root(
                *_repeat_batch(branch.args, size, len(lags)),
                **_repeat_batch(branch.kwargs, size, len(lags)),
            )
        finally:
            self._branch, self._replay = None, None
        return [_rows(output, i * size, (i + 1) * size) for i in range(len(lags))]

    def batches_repeat(self, number: int, tolerance: float = 1e-2) -> bool:
        """Whether a batch repeated twice gives the recorded output twice, so that lags can batch.

        The test catches arguments that a repetition by their leading size gets wrong.
        """
        branch = self.branches[number]
        expected = _first_tensor(branch.output)
        size = expected.shape[0]
        try:
            output = _first_tensor(
                self._root(
                    *_repeat_batch(branch.args, size, 2), **_repeat_batch(branch.kwargs, size, 2)
                )
            )
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False
        if output.shape[0] != 2 * size:
            return False
        error = (output - _repeat(expected, 2)).norm() / expected.norm().clamp_min(1e-12)
        return bool(error < tolerance)

    def residual_bytes(self, group: int) -> int:
        """Bytes of one stored residual of a group, all branches, for the whole batch."""
        return sum(
            tensor.nbytes for branch in self.branches for tensor in branch.residuals[group].values()
        )

    def held_bytes(self) -> int:
        """Bytes of all outputs and residuals that are held, wherever they are."""
        held = {
            id(tensor): tensor.nbytes
            for branch in self.branches
            for streams in (
                *branch.outputs,
                *branch.residuals,
                *(entry for history in branch.history for entry in history),
            )
            for tensor in streams.values()
        }
        return sum(held.values())


def device_of(module: nn.Module) -> torch.device:
    """Where a model computes."""
    # accelerate's hooks keep the weights of an offloaded model elsewhere and know the device.
    hooked = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
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
    if isinstance(output, Tensor):
        return output
    first = output[0]
    found: Tensor = first[0] if isinstance(first, list) else first
    return found


def _rows(output: Any, start: int, stop: int) -> Any:
    """Rows of an output, in the model's own output type."""
    if isinstance(output, Tensor):
        return output[start:stop]
    if isinstance(output, tuple | list):
        return type(output)(_rows(item, start, stop) for item in output)
    if isinstance(output, dict):
        return type(output)(**{name: _rows(item, start, stop) for name, item in output.items()})
    return output
