"""The choice among candidate schedules once their gains are known.

The separable objective adds the squared errors of cells. Errors of a trajectory add as vectors, and
trajectory gains make them cancel, so the schedule that is best by the objective need not be the
best one with its gains. `dp` proposes one schedule for every number of skipped steps; each gets its
gains, and the least final error on prompts left out of the fit decides, with a handicap for caching
groups.
"""

from __future__ import annotations

from collections.abc import Sequence

from layercache.solver.gains import GainFit, fit_gains
from layercache.solver.pricing import STEP_NAME
from layercache.solver.solution import ScheduleSolution
from layercache.stats import CalibrationStats

WORST_RATIO = 2.0
"""Candidates beyond this multiple of the least objective are not fitted: on the reference model the
choice lay within 1.5 times."""

GROUP_HANDICAP_DB = 3.0
"""How much better a candidate that caches groups must be predicted to be than one that does not.

Velocity deltas are measured one group at a time, so groups that are cached at the same step, and
their error's growth along the trajectory, are foretold too well. On eight validation prompts of the
reference model, candidates with cached groups were predicted 0.2 to 1.6 dB above those without and
came out 0.3 dB above to 4.9 dB below them."""


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
    return min(fits, key=_rank)


def _rank(pair: tuple[ScheduleSolution, GainFit]) -> float:
    """Predicted log10 error, with the handicap."""
    solution, fit = pair
    groups = any(unit.name != STEP_NAME and unit.cached.any() for unit in solution.units)
    with_step = any(unit.name == STEP_NAME for unit in solution.units)
    return fit.score + (GROUP_HANDICAP_DB / 10 if groups and with_step else 0.0)
