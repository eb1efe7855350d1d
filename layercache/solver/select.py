"""The choice among candidate schedules once their gains are known.

The separable objective adds the squared errors of cells. Errors of a trajectory add as vectors, and
trajectory gains make them cancel, so the schedule that is best by the objective need not be the
best one with its gains. `dp` proposes one schedule for every number of skipped steps; each gets its
gains, and the least final error on prompts left out of the fit decides.
"""

from __future__ import annotations

from collections.abc import Sequence

from layercache.solver.gains import GainFit, fit_gains
from layercache.solver.problem import ScheduleSolution
from layercache.stats import CalibrationStats

WORST_RATIO = 2.0
"""Candidates beyond this multiple of the least objective are not fitted: on the reference model the
choice lay within 1.5 times."""


def best_candidate(
    stats: CalibrationStats,
    candidates: Sequence[ScheduleSolution],
    gains: str,
    *,
    corrections: bool = True,
) -> tuple[ScheduleSolution, GainFit]:
    """The candidate whose final error, with its gains, is predicted to be least, and its gains.

    Without trajectory gains the objective decides alone.

    Args:
        stats: The statistics that priced the candidates.
        candidates: At least one, least objective first.
        gains: How gains are fitted.
        corrections: Whether computed steps may carry gains (see `gains.fit_gains`).
    """
    first = candidates[0]
    if gains != "trajectory":
        return first, fit_gains(stats, first.units, gains)
    fits = [
        (candidate, fit_gains(stats, candidate.units, gains, corrections=corrections))
        for candidate in candidates
        if candidate.objective <= WORST_RATIO * first.objective
    ]
    return min(fits, key=lambda pair: pair[1].score)
