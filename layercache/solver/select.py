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
"""Candidates beyond this multiple of the least objective, of those that cache groups or of those
that do not, are not fitted: on the reference model the choice lay within 1.5 times."""

GROUP_HANDICAP_DB = 6.0
GROUP_SHARE_DB = 40.0
"""How much better a candidate that caches groups must be predicted to be than one that does not:
`GROUP_HANDICAP_DB + GROUP_SHARE_DB * s^2`, s the share of all compute that its groups save.

Velocity deltas are measured one group at a time, so groups that are cached at the same step, and
their error's growth along the trajectory, are foretold too well. On the reference model plans of
groups alone came out 0.5 to 3.6, 1.5 to 16 and 10 to 24 dB below what was predicted at shares s of
0.27, 0.5 and 0.67 (1, 3, 4 and 8 groups). Candidates that saved little by groups were predicted 0.2
to 1.6 dB above those without, and came out 0.3 dB above to 4.9 dB below them. Besides, only those
without can have multistep rows, which are worth 1.3 to 4.3 dB that is not predicted."""


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
    # The objective, too, is too low with cached groups: each kind is held against its own least.
    least: dict[bool, float] = {}
    for candidate in candidates:
        groups = handicap(stats, candidate) > 0
        least[groups] = min(candidate.objective, least.get(groups, candidate.objective))
    fits = [
        (candidate, fit_gains(stats, candidate.units, gains, corrections=corrections))
        for candidate in candidates
        if candidate.objective <= WORST_RATIO * least[handicap(stats, candidate) > 0]
    ]
    return min(fits, key=lambda pair: pair[1].score + handicap(stats, pair[0]) / 10)


def handicap(stats: CalibrationStats, solution: ScheduleSolution) -> float:
    """Decibels by which a candidate is taken to be foretold too well.

    0 for one that caches no group within a step, and where whole steps cannot be skipped instead.
    """
    cells = {unit.name: int(unit.cached.sum()) for unit in solution.units}
    if cells.pop(STEP_NAME, None) is None or not any(cells.values()):
        return 0.0
    full = stats.num_steps * (float(stats.group_ms.sum()) + stats.rest_ms)
    saved = sum(
        cells.get(group.name, 0) * float(milliseconds)
        for group, milliseconds in zip(stats.groups, stats.group_ms, strict=True)
    )
    return GROUP_HANDICAP_DB + GROUP_SHARE_DB * (saved / full) ** 2
