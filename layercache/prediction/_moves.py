"""`Table`: which schedules there are, what they cost, and how one becomes another.

A schedule is a boolean table (T, 1+G): whether each step, and each group at it, is computed; a
group is never computed at a skipped step. Column 0 is the step unit.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from layercache.solver.problem import BUDGET_RTOL, BoolArray, FloatArray

NEAR = (1, -1, 2, -2, 3, -3)
NEAR_SHARE = 0.6
FEW_STEPS = 8
"""Of so few steps besides fixed ones all schedules are tried that skip whole steps."""


@dataclass(frozen=True, eq=False)
class Table:
    """The schedules that are allowed.

    Attributes:
        cost: (T, 1+G) milliseconds of what a computed step spends outside groups, and of each
        group. fixed: (T,) steps at which everything is computed; step 0 is one. skips: Whether
        whole steps may be skipped. groups: The groups that may be cached. step_reach: Most steps
        between a skipped step and its anchor. group_reach: The same of a group's cached cell.
    """

    cost: FloatArray
    fixed: BoolArray
    skips: bool
    groups: tuple[int, ...]
    step_reach: int
    group_reach: int

    @property
    def steps(self) -> int:
        """T."""
        return len(self.cost)

    @cached_property
    def full(self) -> BoolArray:
        """Everything computed."""
        return np.ones(self.cost.shape, dtype=bool)

    @cached_property
    def step_cost(self) -> FloatArray:
        """(T,) milliseconds of each step in full."""
        total: FloatArray = self.cost.sum(axis=1)
        return total

    def spent(self, computed: BoolArray) -> float:
        """Milliseconds of a schedule."""
        return float(self.cost[computed].sum())

    def fits(self, computed: BoolArray, budget_ms: float) -> bool:
        """Whether it is within a budget."""
        return self.spent(computed) <= budget_ms + BUDGET_RTOL * abs(budget_ms)

    def allowed(self, computed: BoolArray) -> bool:
        """Whether what is cached may be, and is near enough to its anchor."""
        if not computed[self.fixed].all():
            return False
        run = np.flatnonzero(computed[:, 0])
        if np.diff(np.append(run, self.steps)).max() > self.step_reach + 1:
            return False
        for group in range(computed.shape[1] - 1):
            own = computed[run, 1 + group]
            if not own.all():
                if group not in self.groups:
                    return False
                anchors = np.maximum.accumulate(np.where(own, run, 0))
                if (run - anchors).max() > self.group_reach:
                    return False
        return True

    def uniform(self, budget_ms: float) -> list[BoolArray]:
        """Evenly spaced schedules within a budget, of steps or of groups (at once, and in turn)."""
        found = []
        if self.skips:
            for count in range(self.steps, 0, -1):
                table = np.zeros_like(self.full)
                table[np.round(np.linspace(0, self.steps - 1, count)).astype(int)] = True
                table[self.fixed] = True
                if self.fits(table, budget_ms):
                    found.append(table)
                    break
        else:
            for shift in (0, 1):
                for every in range(1, self.group_reach + 2):
                    table = self.full.copy()
                    for group in self.groups:
                        table[:, 1 + group] = (np.arange(self.steps) + shift * group) % every == 0
                    table[self.fixed] = True
                    if self.fits(table, budget_ms):
                        found.append(table)
                        break
        return [table for table in found if self.allowed(table)]

    def step_schedules(self) -> list[BoolArray]:
        """All schedules that skip whole steps, if they are few; else none."""
        free = np.flatnonzero(~self.fixed)
        if not self.skips or len(free) > FEW_STEPS:
            return []
        found = []
        for choice in itertools.product((True, False), repeat=len(free)):
            table = self.full.copy()
            table[free] = np.array(choice)[:, None]
            found.append(table)
        return [table for table in found if self.allowed(table)]

    def additions(self, computed: BoolArray, budget_ms: float) -> list[BoolArray]:
        """All schedules within a budget that compute one skipped step or cached group more."""
        room = budget_ms + BUDGET_RTOL * abs(budget_ms) - self.spent(computed)
        found = []
        for step in np.flatnonzero(~computed[:, 0] & (self.step_cost <= room)):
            found.append(_with(computed, (step, slice(None)), True))
        for group in self.groups:
            cached = computed[:, 0] & ~computed[:, 1 + group] & (self.cost[:, 1 + group] <= room)
            found += [_with(computed, (step, 1 + group), True) for step in np.flatnonzero(cached)]
        return found

    def neighbour(
        self, computed: BoolArray, budget_ms: float, rng: np.random.Generator
    ) -> BoolArray | None:
        """A random schedule near another and within a budget, or None if the draw leads nowhere."""
        kinds = ["step"] if self.skips else []
        if self.groups:
            kinds += ["group", "trade"] if self.skips else ["group"]
        kind = kinds[int(rng.integers(len(kinds)))]
        if kind == "step":
            moved = self._move_step(computed, rng)
        elif kind == "group":
            moved = self._move_group(computed, budget_ms, rng)
        else:
            moved = self._trade(computed, budget_ms, rng)
        if moved is None or not self.fits(moved, budget_ms) or not self.allowed(moved):
            return None
        return moved

    def _move_step(self, computed: BoolArray, rng: np.random.Generator) -> BoolArray | None:
        """One computed step, with its groups, moves to a skipped one."""
        movable = np.flatnonzero(computed[:, 0] & ~self.fixed)
        if not len(movable):
            return None
        step = int(movable[rng.integers(len(movable))])
        target = self._near(step, rng)
        if not 0 <= target < self.steps or computed[target, 0]:
            return None
        moved = computed.copy()
        moved[target], moved[step] = computed[step], False
        return moved

    def _move_group(
        self, computed: BoolArray, budget_ms: float, rng: np.random.Generator
    ) -> BoolArray | None:
        """A group is cached at one step, and it or another is computed at one near."""
        group, other = (self.groups[int(k)] for k in rng.integers(len(self.groups), size=2))
        movable = np.flatnonzero(computed[:, 1 + group] & ~self.fixed)
        if not len(movable):
            return None
        step = int(movable[rng.integers(len(movable))])
        target = self._near(step, rng) if rng.random() < NEAR_SHARE else step
        if not 0 <= target < self.steps or not computed[target, 0] or computed[target, 1 + other]:
            return None
        moved = _with(computed, (step, 1 + group), False)
        moved[target, 1 + other] = True
        return self._filled(moved, budget_ms, rng)

    def _trade(
        self, computed: BoolArray, budget_ms: float, rng: np.random.Generator
    ) -> BoolArray | None:
        """A step is skipped and cached groups are computed instead, or the reverse."""
        moved = computed.copy()
        if rng.random() < 0.5:
            movable = np.flatnonzero(computed[:, 0] & ~self.fixed)
            if not len(movable):
                return None
            moved[int(movable[rng.integers(len(movable))])] = False
            return self._filled(moved, budget_ms, rng)
        skipped = np.flatnonzero(~computed[:, 0])
        if not len(skipped):
            return None
        moved[int(skipped[rng.integers(len(skipped))])] = True
        group = self.groups[int(rng.integers(len(self.groups)))]
        loose = np.flatnonzero(moved[:, 1 + group] & ~self.fixed)
        for step in loose[rng.permutation(len(loose))].tolist():
            if self.fits(moved, budget_ms):
                break
            moved[step, 1 + group] = False
        return moved

    def _filled(self, computed: BoolArray, budget_ms: float, rng: np.random.Generator) -> BoolArray:
        """Random cached groups computed for as long as they fit."""
        room = budget_ms - self.spent(computed)
        columns = [1 + group for group in self.groups]
        if room < self.cost[:, columns].min():
            return computed
        cells = [
            (int(step), column)
            for column in columns
            for step in np.flatnonzero(computed[:, 0] & ~computed[:, column])
        ]
        for index in rng.permutation(len(cells)).tolist():
            cost = float(self.cost[cells[index]])
            if cost <= room:
                computed[cells[index]] = True
                room -= cost
        return computed

    def _near(self, step: int, rng: np.random.Generator) -> int:
        if rng.random() < NEAR_SHARE:
            return step + NEAR[int(rng.integers(len(NEAR)))]
        return int(rng.integers(self.steps))


def _with(computed: BoolArray, place: tuple[Any, ...], value: bool) -> BoolArray:
    changed = computed.copy()
    changed[place] = value
    return changed


def distinct(tables: Sequence[BoolArray]) -> list[BoolArray]:
    """Each schedule once, in order."""
    return list({table.tobytes(): table for table in tables}.values())
