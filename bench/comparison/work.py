"""How much of the transformer's work a method really did, and how much memory it held.

Online methods decide as they run, so their share of compute is counted, not computed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn


class Work:
    """Multiply-adds of the linear layers that ran."""

    def __init__(self) -> None:
        self.multiply_adds = 0


@contextmanager
def counted_work(transformer: nn.Module) -> Iterator[Work]:
    """Count the multiply-adds of every linear layer of `transformer` that runs in the context.

    Attention scores are left out; they are skipped together with the layers around them. Counting
    costs about 1 % of the time of a small model, so nothing is timed while it is on.
    """
    work = Work()

    def count(layer: nn.Linear, arguments: tuple[Any, ...], output: Any) -> None:
        work.multiply_adds += arguments[0].numel() * layer.out_features

    handles = [
        module.register_forward_hook(count)
        for module in transformer.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield work
    finally:
        for handle in handles:
            handle.remove()


_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """Peak memory between `start` and `stop`, in bytes, or None where the system cannot say.

    On a GPU: the allocator's peak. On Linux: the peak resident memory of the process, weights and
    libraries included, which the kernel lets a process reset.
    """

    def start(self) -> None:
        """Forget earlier peaks."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            with suppress(OSError):
                _CLEAR.write_text("5")

    def stop(self) -> int | None:
        """The peak since `start`."""
        if torch.cuda.is_available():
            return int(torch.cuda.max_memory_allocated())
        with suppress(OSError, StopIteration, ValueError):
            lines = _STATUS.read_text().splitlines()
            line = next(line for line in lines if line.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        return None
