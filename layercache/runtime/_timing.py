"""Time by unit: host clock on the CPU, recorded events on CUDA, which are read only on request."""

from __future__ import annotations

import time
from typing import Any

import torch

Mark = Any
"""A moment: seconds of the host clock, or a recorded `torch.cuda.Event`."""


class Clock:
    """Takes marks on the device that the forward under way runs on; never waits for it."""

    def __init__(self) -> None:
        self._device: torch.device | None = None

    def follow(self, device: torch.device | None) -> None:
        """Take the marks that follow on this device."""
        self._device = device if device is not None and device.type == "cuda" else None

    def mark(self) -> Mark:
        """This moment, in the order of the work given to the device."""
        if self._device is None:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


class Stopwatch:
    """The sum of several intervals."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._pending: list[tuple[Any, Any]] = []

    def add(self, start: Mark, end: Mark) -> None:
        """Add the interval between two marks of one clock."""
        if isinstance(start, float):
            self._seconds += end - start
        else:
            self._pending.append((start, end))

    @property
    def seconds(self) -> float:
        """The sum so far. Waits for the device if it has not got there."""
        for start, end in self._pending:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1e3
        self._pending.clear()
        return self._seconds
