"""Step schedules worth trying: which steps to skip, when groups can be cached besides.

Up to `ALL_STEPS` steps, all of them. Beyond, two sources, neither of which looks at the budget, so
that every budget chooses from the same set and a larger one is never worse:

1. The step unit's own front: for every number of run steps the schedule of least price. These are
   right where groups are refreshed at every run step.
2. Multipliers: at a price lam per millisecond, the decomposition of `bound` sets a price pi[g, t]
   on running group g at step t, and the step unit's shortest path under these prices is a schedule
   that knows what a step's groups cost to run or to cache. For each lam of a geometric grid, a few
   subgradient steps on pi (idle cells of a group where the step is run lower its price, and the
   reverse) give a few schedules.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from layercache.solver.bound import Paths
from layercache.solver.front import solve_fronts
from layercache.solver.problem import BoolArray, Family, FloatArray, ScheduleProblem
from layercache.solver.solution import resolve_cells

ALL_STEPS = 8
GRID = 16
ROUNDS = 8
_SPREAD = (0.02, 50.0)


@dataclass(frozen=True, eq=False)
class StepSchedule:
    """Which steps are run, what skipping the others costs, and the bytes that it reserves."""

    run: BoolArray
    depth: int
    price: float
    size: int


def step_schedules(
    problem: ScheduleProblem, family: Family, groups: FloatArray | None, depths: Sequence[int]
) -> tuple[StepSchedule, ...]:
    """Schedules of a family's step unit, all steps run first; that one alone without a step unit.

    Args:
        problem: Any schedule problem.
        family: One of the problem's families.
        groups: (G, T, L, J+1) tables of its groups, padded to one shape; None without groups.
        depths: Depths of base to try.
    """
    everything = np.ones(problem.num_steps, dtype=bool)
    found = [StepSchedule(everything, 0, 0.0, 0)]
    if family.step is None:
        return tuple(found)
    unit, prices = problem.units[family.step], problem.prices[family.step]
    if problem.num_steps <= ALL_STEPS:
        shared = _all(problem.num_steps)
    else:
        shared = [] if groups is None else _guided(problem, family, groups)
    for depth in depths:
        size = unit.residual_bytes * (1 + depth) + unit.extra_bytes
        front = solve_fronts(prices[None], depth)
        masks = {}
        for count in range(problem.num_steps - 1, 0, -1):
            if np.isfinite(front.values[0, count]):
                mask = front.refreshes(0, count)
                masks[mask.tobytes()] = mask
        masks.update((mask.tobytes(), mask) for mask in shared if not mask.all())
        for mask in masks.values():
            price = resolve_cells(prices, mask, everything, depth)[2]
            if np.isfinite(price):
                found.append(StepSchedule(mask, depth, price, size))
    return tuple(found)


def _all(steps: int) -> list[BoolArray]:
    """Every mask that runs step 0."""
    later = itertools.product((True, False), repeat=steps - 1)
    return [np.array((True, *mask)) for mask in later]


def _guided(problem: ScheduleProblem, family: Family, groups: FloatArray) -> list[BoolArray]:
    """Schedules of the second source."""
    assert family.step is not None
    unit, table = problem.units[family.step], problem.prices[family.step][None]
    finite = table[np.isfinite(table) & (table > 0)]
    ms = np.array([problem.units[group].refresh_ms for group in family.groups])
    full = float(ms.sum()) + unit.refresh_ms
    if not len(finite) or full <= 0:
        return []
    steps = problem.num_steps
    whole = Paths(table, min(table.shape[1] + 1, steps), problem.history)
    reach = min(groups.shape[2] + table.shape[1] + 1, steps)
    parts = Paths(groups, reach, problem.history)
    blocked = np.zeros(steps, dtype=bool)
    blocked[[0, *sorted(problem.forced)]] = True
    found = {}
    for lam in float(np.median(finite)) / full * np.geomspace(*_SPREAD, GRID):
        pi: FloatArray = np.repeat((0.9 * lam * ms)[:, None], steps, axis=1)
        for turn in range(ROUNDS):
            reward = -pi.sum(axis=0)[None]
            run = whole.solve(np.array([lam * unit.refresh_ms]), reward=reward)[1][0]
            found[run.tobytes()] = run
            idle = parts.solve(lam * ms, idle=np.where(blocked, np.inf, pi))[2]
            slope = idle.astype(float) - ~run
            slope[:, blocked] = 0.0
            if not slope.any():
                break
            pi = pi + 0.5 * lam * float(ms.mean()) / (1 + turn) ** 0.7 * slope
    return list(found.values())
