"""Schedules searched on the error that their own multistep rows are foreseen to leave.

`solver.polish` searches with one earlier velocity a step and with errors that count as turned by
the model's growth. Rows that read four earlier velocities want other steps than that. The score
here is that of `solver.multistep`, with one ridge for all rows.

A search exploits what its score does not see, which here was how the accelerated run's own
velocities differ: bench/FINDINGS.md has what the score without that term led to.
"""

from __future__ import annotations

import numpy as np

from layercache.solver.anneal import ScheduleSearch
from layercache.solver.multistep import DEPTH, Multistep
from layercache.solver.problem import BoolArray

RIDGE = 1e-3
RESTARTS = 4
MOST_LOSS_DB = 2.5
"""A schedule found here is refused if the PSNR that its plan predicts falls more. On the reference
model it was 2.0 dB lower to 1.8 dB higher, and came out 1.1 dB lower to 3.2 dB higher."""


class MultistepSearch(ScheduleSearch):
    """Moves the computed steps of a multistep method.

    Args:
        rows: Fits of the statistics.
        depth: How many earlier computed steps each row will use.
        forced: Steps that stay computed.
        max_gap: Most steps between a skipped step and its anchor.
        seed: Of the annealing.

    Example:
        >>> better = MultistepSearch(Multistep(stats)).better(run)  # doctest: +SKIP
        >>> better is None or better.sum() == run.sum()  # doctest: +SKIP
        True
    """

    def __init__(
        self,
        rows: Multistep,
        depth: int = DEPTH,
        *,
        forced: frozenset[int] = frozenset(),
        max_gap: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(forced=forced, max_gap=max_gap, seed=seed, restarts=RESTARTS)
        self.rows, self.depth = rows, depth

    def score(self, run: BoolArray) -> float:
        """Mean log10 of the final squared error; infinite if a gap is too long."""
        gaps = np.diff(np.append(np.flatnonzero(run), len(run)))
        if gaps.max() > self.lags + 1:
            return float("inf")
        return self.rows.score(run, RIDGE, self.depth)

    def better(self, run: BoolArray) -> BoolArray | None:
        """Another schedule of as many computed steps, if it is foreseen to be better."""
        if run.all():
            return None
        found = self.search(run)
        return found if self.score(found) < self.score(run) else None
