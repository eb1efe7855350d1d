"""`dp`: exact per-unit fronts, joined by a multiple-choice knapsack.

Without a step unit the objective is a sum over units, and the units meet only in the budget and the
memory limit. `front.solve_fronts` gives each unit's least price for every number of refreshes (and,
under a memory limit, for every depth of base), `knapsack.solve_knapsack` picks one point of each
front. Both are exact, so the result is optimal and says so; should the knapsack run out of room,
its certificate shows the gap.

With a step unit the groups live on the steps that are run, so their fronts depend on which steps
are skipped. Exact here: the best plan of all groups on the run steps of each step schedule that is
tried; without groups, or with at most `steps.ALL_STEPS` steps, the whole problem. Heuristic: beyond
that only the schedules of `steps.step_schedules` are tried, not all 2^(T-1). The lower bound
(`bound.joint_bound`) covers all of them.

With a step unit for each of several branches, one schedule of each is chosen. Exact: all groups of
all branches, given these. Heuristic: which combinations are tried, namely all of them if they are
few, else those that are best at some price per millisecond, for each of a geometric grid of prices.

What is tried does not depend on the budget, so many budgets share one pass, and a larger budget is
never worse.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from layercache.solver.bound import joint_bound
from layercache.solver.front import Front, solve_fronts
from layercache.solver.knapsack import Choice, Options, least_cost, solve_knapsack
from layercache.solver.problem import (
    BoolArray,
    Family,
    FloatArray,
    ScheduleProblem,
    UnitCosts,
    budget_error,
)
from layercache.solver.solution import ScheduleSolution, build_solution
from layercache.solver.steps import ALL_STEPS, StepSchedule, step_schedules

_ALL = 500
"""Up to so many combinations of several branches' schedules, all are tried."""
_PRICES, _SPREAD = 48, (1e-3, 1e3)
"""Prices per millisecond at which combinations of several branches' schedules are formed: how many,
and between which multiples of a typical one."""


class _FamilyFronts:
    """The step schedules of one family, and the fronts of its groups on each of them."""

    def __init__(self, problem: ScheduleProblem, family: Family, depths: tuple[int, ...]) -> None:
        self.problem, self.family, self.depths = problem, family, depths
        self.step = None if family.step is None else problem.units[family.step]
        self.groups = tuple(problem.units[group] for group in family.groups)
        self.tables = (
            _stack([problem.prices[group] for group in family.groups]) if self.groups else None
        )
        self._fronts: dict[int, tuple[tuple[Front, ...], list[Options]]] = {}

    @cached_property
    def schedules(self) -> tuple[StepSchedule, ...]:
        """The schedules of the step unit that are tried, all steps run first."""
        return step_schedules(self.problem, self.family, self.tables, self.depths)

    def spent(self, index: int) -> float:
        """Milliseconds of the step unit alone."""
        run = int(self.schedules[index].run.sum())
        return 0.0 if self.step is None else self.step.refresh_ms * run

    def options(self, index: int) -> list[Options]:
        """The points of all groups' fronts on one step schedule; see `_front_options`."""
        return self._solved(index)[1]

    def least_ms(self, index: int) -> float:
        """Smallest cost of one step schedule with its groups, however much they hold."""
        options = self.options(index)
        return self.spent(index) + (least_cost(options, np.inf) if options else 0.0)

    def priced(self, prices_ms: FloatArray) -> FloatArray:
        """(N, K) least price of each step schedule with its groups at K prices of a millisecond."""
        rows = []
        for index, schedule in enumerate(self.schedules):
            row = schedule.price + prices_ms * self.spent(index)
            for option in self.options(index):
                row = row + (option.error[:, None] + prices_ms * option.cost[:, None]).min(axis=0)
            rows.append(row)
        return np.array(rows)

    def caches(self, index: int, picks: Sequence[int]) -> bool:
        """Whether any pick leaves a group uncomputed at a run step."""
        count = int(self.schedules[index].run.sum())
        return any(pick % (count + 1) != count for pick in picks)

    def masks(self, index: int, picks: Sequence[int]) -> dict[int, tuple[BoolArray, int]]:
        """Refreshed steps and depth of base of every unit of the family, by its position."""
        schedule = self.schedules[index]
        found: dict[int, tuple[BoolArray, int]] = {}
        if self.family.step is not None:
            found[self.family.step] = schedule.run, schedule.depth
        run = np.flatnonzero(schedule.run)
        for row, (group, pick) in enumerate(zip(self.family.groups, picks, strict=True)):
            level, count = divmod(pick, len(run) + 1)
            mask = np.zeros(self.problem.num_steps, dtype=bool)
            mask[run[self._solved(index)[0][level].refreshes(row, count)]] = True
            found[group] = mask, self.depths[level]
        return found

    def _solved(self, index: int) -> tuple[tuple[Front, ...], list[Options]]:
        if self.tables is None:
            return (), []
        if index not in self._fronts:
            tables = compress(self.tables, np.flatnonzero(self.schedules[index].run))
            fronts = tuple(solve_fronts(tables, depth) for depth in self.depths)
            options = [
                _front_options(unit, [front.values[row] for front in fronts], self.depths)
                for row, unit in enumerate(self.groups)
            ]
            self._fronts[index] = (fronts, options)
        return self._fronts[index]


class DynamicProgramme:
    """The fronts of one problem, computed when first needed and shared by all budgets.

    Example:
        >>> programme = DynamicProgramme(problem)  # doctest: +SKIP
        >>> [programme.solve(budget).objective for budget in (40.0, 30.0, 20.0)]  # doctest: +SKIP
    """

    def __init__(self, problem: ScheduleProblem) -> None:
        self.problem = problem
        limited = problem.max_cache_bytes is not None
        depths = tuple(range(problem.history + 1)) if limited else (problem.history,)
        self._size_limit = np.inf if not limited else float(problem.max_cache_bytes or 0)
        self._families = [_FamilyFronts(problem, family, depths) for family in problem.families]

    @cached_property
    def _all_combinations(self) -> bool:
        counts = [len(part.schedules) for part in self._families]
        return len(counts) == 1 or math.prod(counts) <= _ALL

    @cached_property
    def _combinations(self) -> tuple[tuple[int, ...], ...]:
        """The step schedules that are tried, one of each family; all steps run first."""
        if self._all_combinations:
            return tuple(itertools.product(*(range(len(p.schedules)) for p in self._families)))
        found = {tuple(0 for _ in self._families): True}
        finite = np.concatenate([t[np.isfinite(t) & (t > 0)] for t in self.problem.prices])
        typical_ms = np.mean([unit.refresh_ms for unit in self.problem.units]) or 1.0
        typical = float(np.median(finite)) / typical_ms if len(finite) else 1.0
        # The last price is that of milliseconds alone: the smallest feasible budget.
        tables = [part.priced(typical * np.geomspace(*_SPREAD, _PRICES)) for part in self._families]
        least = [
            np.array([[part.least_ms(i)] for i in range(len(part.schedules))])
            for part in self._families
        ]
        depths = [np.array([s.depth for s in part.schedules]) for part in self._families]
        # A shallower schedule may be dearer and hold less, so every depth gets its own best.
        for depth in range(self.problem.history + 1):
            picks = [
                np.where(deep[:, None] <= depth, np.hstack([table, cost]), np.inf).argmin(axis=0)
                for table, cost, deep in zip(tables, least, depths, strict=True)
            ]
            found.update((tuple(int(k) for k in column), True) for column in np.transpose(picks))
        return tuple(found)

    @cached_property
    def smallest_budget_ms(self) -> float:
        """The least budget that any schedule tried here can meet."""
        least = np.inf
        for indices in self._combinations:
            room = self._size_limit - sum(s.size for s in self._schedules(indices))
            if room < 0:
                continue
            spent = self._spent(indices)
            options = self._options(indices)
            least = min(least, spent + (least_cost(options, room) if options else 0.0))
        return least

    def solve(self, budget_ms: float) -> ScheduleSolution:
        """The best schedule within a budget.

        Raises:
            BudgetError: Nothing fits; the message gives the smallest feasible budget.
        """
        return self.candidates(budget_ms, 1)[0]

    def candidates(self, budget_ms: float, count: int | None = None) -> list[ScheduleSolution]:
        """For each number of run steps the best schedule, least objective first.

        There may be two of one number: one that caches groups and one that does not. The lower
        bound of each is that of the whole problem.

        Args:
            budget_ms: The budget.
            count: Keep so many; None keeps all.

        Raises:
            BudgetError: Nothing fits; the message gives the smallest feasible budget.
        """
        least: dict[tuple[int, bool], tuple[float, tuple[int, ...], Choice]] = {}
        floor = np.inf
        for indices in self._combinations:
            schedules = self._schedules(indices)
            price = sum(schedule.price for schedule in schedules)
            # Prices of groups are not negative, so these schedules cannot win any more.
            if count == 1 and any(price >= rival[0] for rival in least.values()):
                continue
            choice = self._choose(indices, budget_ms)
            if choice is None:
                continue
            run = sum(int(schedule.run.sum()) for schedule in schedules)
            total, floor = price + choice.error, min(floor, price + choice.lower_bound)
            kind = run, self._caches(indices, choice)
            if kind not in least or total < least[kind][0]:
                least[kind] = (total, indices, choice)
        if not least:
            limited = self.problem.with_budget(budget_ms)
            raise budget_error(limited, self.smallest_budget_ms, proven=self._complete)
        ranked = sorted(least.values(), key=lambda entry: entry[:2])
        bound = self._bound(budget_ms, ranked[0][0], floor)
        return [
            self._solution(indices, choice, budget_ms, bound)
            for _, indices, choice in ranked[:count]
        ]

    @property
    def _complete(self) -> bool:
        """Whether what is tried holds an optimum of the whole problem."""
        if not any(part.step is not None and part.groups for part in self._families):
            # No step unit governs groups: the fronts are exact and are searched whole.
            return True
        return self._all_combinations and self.problem.num_steps <= ALL_STEPS

    def _bound(self, budget_ms: float, total: float, floor: float) -> float:
        """A lower bound of the whole problem, from the best objective and the best bound tried."""
        if self._complete:
            return floor
        limit = self.problem.with_budget(budget_ms).budget_limit
        return joint_bound(self.problem, [part.tables for part in self._families], limit, total)

    def _schedules(self, indices: Sequence[int]) -> list[StepSchedule]:
        return [part.schedules[i] for part, i in zip(self._families, indices, strict=True)]

    def _options(self, indices: Sequence[int]) -> list[Options]:
        parts = zip(self._families, indices, strict=True)
        return [option for part, index in parts for option in part.options(index)]

    def _spent(self, indices: Sequence[int]) -> float:
        """Milliseconds of everything but the groups."""
        parts = zip(self._families, indices, strict=True)
        return self.problem.fixed_ms + sum(part.spent(index) for part, index in parts)

    def _choose(self, indices: Sequence[int], budget_ms: float) -> Choice | None:
        """The exact choice of all groups on the run steps of given step schedules."""
        limit = self.problem.with_budget(budget_ms).budget_limit - self._spent(indices)
        room = self._size_limit - sum(schedule.size for schedule in self._schedules(indices))
        if limit < 0 or room < 0:
            return None
        options = self._options(indices)
        return solve_knapsack(options, limit, room) if options else Choice((), 0.0, 0.0)

    def _divided(
        self, indices: Sequence[int], choice: Choice
    ) -> Iterator[tuple[_FamilyFronts, int, tuple[int, ...]]]:
        """Each family with its step schedule and its own picks."""
        begin = 0
        for part, index in zip(self._families, indices, strict=True):
            yield part, index, choice.picks[begin : begin + len(part.groups)]
            begin += len(part.groups)

    def _caches(self, indices: Sequence[int], choice: Choice) -> bool:
        return any(part.caches(index, own) for part, index, own in self._divided(indices, choice))

    def _solution(
        self, indices: Sequence[int], choice: Choice, budget_ms: float, bound: float
    ) -> ScheduleSolution:
        masks: dict[int, tuple[BoolArray, int]] = {}
        for part, index, picks in self._divided(indices, choice):
            masks |= part.masks(index, picks)
        order = range(len(self.problem.units))
        return build_solution(
            self.problem.with_budget(budget_ms),
            [masks[unit][0] for unit in order],
            [masks[unit][1] for unit in order],
            solver="dp",
            lower_bound=bound,
        )


def solve(problem: ScheduleProblem) -> ScheduleSolution:
    """Solve by exact fronts and a knapsack; see the module's text.

    Raises:
        BudgetError: No schedule fits; the message gives the smallest feasible budget.
    """
    return DynamicProgramme(problem).solve(problem.budget_ms)


def solve_many(problem: ScheduleProblem, budgets_ms: Sequence[float]) -> list[ScheduleSolution]:
    """The same problem under several budgets, from one pass over the fronts."""
    programme = DynamicProgramme(problem)
    return [programme.solve(budget) for budget in budgets_ms]


def compress(prices: FloatArray, run: np.ndarray) -> FloatArray:
    """Tables over the run steps alone: position k stands for step run[k].

    (U, T, L, J+1) to (U, R, L, J+1); lags and spans count positions, prices still those of the true
    steps. Cells that reach further than the tables go are infinite.
    """
    _, steps, lags, columns = prices.shape
    if len(run) == steps:
        return prices
    k, i, j = np.ogrid[: len(run), :lags, :columns]
    anchor, base = k - 1 - i, k - 1 - i - j
    step = run[np.broadcast_to(k, (len(run), lags, columns))]
    anchor_step, base_step = run[np.maximum(anchor, 0)], run[np.maximum(base, 0)]
    lag, span = step - 1 - anchor_step, anchor_step - base_step
    usable = (base >= 0) & (lag < lags) & (span < columns)
    picked = prices[:, step, np.clip(lag, 0, lags - 1), np.clip(span, 0, columns - 1)]
    result: FloatArray = np.where(usable, picked, np.inf)
    return result


def _stack(tables: Sequence[FloatArray]) -> FloatArray:
    """Tables of several units, padded with infinity to one shape."""
    steps = len(tables[0])
    lags = max(table.shape[1] for table in tables)
    columns = max(table.shape[2] for table in tables)
    stacked = np.full((len(tables), steps, lags, columns), np.inf)
    for row, table in zip(stacked, tables, strict=True):
        row[:, : table.shape[1], : table.shape[2]] = table
    return stacked


def _front_options(unit: UnitCosts, values: list[FloatArray], depths: tuple[int, ...]) -> Options:
    """Option level * (R + 1) + n: n refreshes with bases up to depths[level]."""
    counts = np.arange(len(values[0]))
    sizes = []
    for depth in depths:
        size = np.full(len(counts), float(unit.residual_bytes * (1 + depth) + unit.extra_bytes))
        size[-1] = 0.0
        sizes.append(size)
    return Options(
        cost=np.tile(counts * unit.refresh_ms, len(depths)),
        size=np.concatenate(sizes),
        error=np.concatenate(values),
    )
