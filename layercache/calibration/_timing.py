"""Where a step's time goes: each group, the rest of the transformer, everything outside it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from layercache.models.clock import Clock, Mark

_COLD_STEPS = 2


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
