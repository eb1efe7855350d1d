"""Time on a device: recorded CUDA events, so that nothing waits in mid-run; elsewhere the clock."""

from __future__ import annotations

import time
from typing import Any

import torch

Mark = Any
"""A point in time: seconds, or a recorded `torch.cuda.Event`."""


class Clock:
    """Marks points in the time of one device.

    Example:
        >>> clock = Clock(torch.device("cpu"))
        >>> clock.seconds(clock.mark(), clock.mark()) >= 0
        True
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Mark:
        """Now, in the order of the work given to the device."""
        if self.device.type == "cuda":
            event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self.device))
            return event
        if self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    @staticmethod
    def seconds(start: Mark, stop: Mark) -> float:
        """Seconds from one mark to a later one; waits until the device has passed both."""
        if isinstance(start, float):
            return float(stop - start)
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3
