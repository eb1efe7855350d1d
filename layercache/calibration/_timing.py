"""Where a step's time goes: each group, the rest of the transformer, everything outside it.

On a GPU times are those of CUDA events, so that nothing waits in mid-run; elsewhere of the clock.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Mark = Any
"""A point in time: seconds, or a recorded CUDA event."""

_COLD_STEPS = 2


class Clock:
    """Marks points in the time of one device.

    Example:
        >>> clock = Clock(torch.device("cpu"))
        >>> clock.seconds(clock.mark(), clock.mark()) >= 0
        True
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Mark:
        """Now, on the device."""
        if self._device.type == "cuda":
            event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            return event
        if self._device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    def seconds(self, start: Mark, stop: Mark) -> float:
        """Seconds from one mark to a later one; waits until the device has passed both."""
        if self._device.type == "cuda":
            stop.synchronize()
            return float(start.elapsed_time(stop)) / 1e3
        return float(stop - start)


class StepTimes:
    """Spans of every recorded step, and their medians over warm steps.

    Call `call` and `group` for every transformer call and group, `aside` for what calibration
    itself does between them, `outside` for what a step spends between and after its calls, and
    `end_step` once a step.
    """

    def __init__(self, clock: Clock, groups: int) -> None:
        self.clock = clock
        self._groups = groups
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        # A row a step: one entry a group, then asides, then calls, then the windows around them.
        self._rows: list[list[list[tuple[Mark, Mark]]]] = [self._row()]

    def _row(self) -> list[list[tuple[Mark, Mark]]]:
        return [[] for _ in range(self._groups + 3)]

    def like(self) -> StepTimes:
        """An empty one of the same clock and groups."""
        return StepTimes(self.clock, self._groups)

    def group(self, index: int, start: Mark, stop: Mark) -> None:
        """A group ran."""
        self._rows[-1][index].append((start, stop))

    def aside(self, start: Mark, stop: Mark) -> None:
        """Calibration did something of its own between two calls."""
        self._rows[-1][-3].append((start, stop))

    def call(self, start: Mark, stop: Mark) -> None:
        """The transformer ran."""
        self._rows[-1][-2].append((start, stop))

    def outside(self, start: Mark, stop: Mark) -> None:
        """A window of the step that holds its calls, or none of them."""
        self._rows[-1][-1].append((start, stop))

    def end_step(self) -> None:
        """What follows belongs to the next step."""
        self._rows.append(self._row())

    def seconds(self) -> NDArray[np.float64]:
        """(steps, G+2) seconds: each group, the transformer without them, the step without it."""
        rows = [row for row in self._rows if row[-2]]
        sums = np.array(
            [[sum(self.clock.seconds(*span) for span in spans) for spans in row] for row in rows]
        )
        times = sums.reshape(len(rows), self._groups + 3)
        groups, aside, call, window = times[:, :-3], times[:, -3], times[:, -2], times[:, -1]
        rest = np.maximum(call - groups.sum(axis=1), 0.0)
        return np.column_stack([groups, rest, np.maximum(window - call - aside, 0.0)])

    def median_ms(self, loads: NDArray[np.float64]) -> NDArray[np.float64]:
        """(G+2,) medians in milliseconds over all but the first steps, as in `CalibrationStats`.

        Args:
            loads: (steps, G+1) what each step had to do, as shares of the fullest; a step that had
                less counts as what it would have taken at 1.
        """
        times = self.seconds()
        start = min(_COLD_STEPS, len(times) - 1)
        full: NDArray[np.float64] = 1e3 * np.median(times[start:], axis=0)
        for column in range(times.shape[1] - 1):
            share = loads[:, column]
            known = np.flatnonzero(share > 0)
            if len(known):
                warm = known[known >= start] if (known >= start).any() else known
                full[column] = 1e3 * np.median(times[warm, column] / share[warm])
        return full
