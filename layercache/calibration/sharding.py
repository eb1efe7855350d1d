"""Prompts split over job arrays (`shard`) and over the processes of a launcher (accelerate).

Whole batches are dealt out, never single prompts, so that every prompt is computed in the same
company, and to the last bit the same, whatever the split.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch

from layercache.errors import StatsError

T = TypeVar("T")
_PATIENCE = timedelta(days=7)
"""Processes that are done wait for the others, longer than the ten minutes that NCCL would."""
Shard = tuple[int, int]


def take_shard(items: Sequence[T], shard: Shard | None) -> list[T]:
    """The items of shard (i, n): those at i, i + n, i + 2n, ...

    Raises:
        StatsError: i is not in 0..n-1, or nothing is left for this shard.

    Example:
        >>> take_shard("abcde", (1, 2))
        ['b', 'd']
    """
    if shard is None:
        return list(items)
    index, count = shard
    if count < 1:
        raise StatsError(f"shard {index}/{count}: the second number must be at least 1")
    if not 0 <= index < count:
        raise StatsError(f"shard {index}/{count}: the first number must be from 0 to {count - 1}")
    if index >= len(items):
        raise StatsError(
            f"shard {index}/{count} is empty: there are {len(items)} batches of prompts; use at "
            "most that many shards, or a smaller batch_size"
        )
    return list(items[index::count])


def launched() -> bool:
    """Whether `torchrun` or `accelerate launch` started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_main_process() -> bool:
    """Whether this process is the one that reports; without a launcher it is."""
    return not launched() or int(os.environ.get("RANK", "0")) == 0


def local_device() -> str | None:
    """The GPU that a launcher meant for this process, if there is one."""
    if not launched() or not torch.cuda.is_available():
        return None
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


class Processes:
    """The processes of a launcher; without one, this process alone.

    Args:
        on_cpu: Whether the model is on the CPU, where processes talk through gloo.
    """

    def __init__(self, on_cpu: bool) -> None:
        self._state: Any = None
        if launched():
            from accelerate import PartialState  # type: ignore[import-untyped]

            self._state = PartialState(cpu=on_cpu, timeout=_PATIENCE)

    def split(self, items: list[T]) -> list[T]:
        """This process's share."""
        if self._state is None:
            return items
        # Not accelerate's split: with fewer items than processes some versions repeat the last.
        return items[self._state.process_index :: self._state.num_processes]

    def gather(self, items: list[T]) -> list[T]:
        """Everyone's items, at everyone, in the order of the processes."""
        if self._state is None:
            return items
        from accelerate.utils import gather_object  # type: ignore[import-untyped]

        return list(gather_object(items))

    def agree(self, value: T) -> T:
        """The main process's value, at everyone."""
        if self._state is None:
            return value
        from accelerate.utils import broadcast_object_list

        holder = [value]
        broadcast_object_list(holder)
        return holder[0]
