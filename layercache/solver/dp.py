"""`dp`: exact per-unit fronts, joined by a multiple-choice knapsack.

Without a step unit the objective is a sum over units, and the units meet only in the budget and the
memory limit. `front.solve_fronts` gives each unit's least price for every number of refreshes (and,
under a memory limit, for every depth of base), `knapsack.solve_knapsack` picks one point of each
front. Both are exact, so the result is optimal and says so; should the knapsack run out of room,
its certificate shows the gap.

With a step unit the groups live on the steps that are run, so their fronts depend on which steps
are skipped. Exact here: the best schedule of the step unit by itself for every number of run steps,
and the best plan of all groups on the run steps of each of these schedules. Heuristic: only those
step schedules are tried (see `step_schedules`), not all 2^(T-1). The lower bound covers all of
them.

The set of step schedules does not depend on the budget, so many budgets share one pass, and a
larger budget is never worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from layercache.solver.bound import joint_bound
from layercache.solver.front import Front, solve_fronts
from layercache.solver.knapsack import Choice, Options, least_cost, solve_knapsack
from layercache.solver.problem import (
    BoolArray,
    FloatArray,
    ScheduleProblem,
    ScheduleSolution,
    UnitCosts,
    budget_error,
    build_solution,
)


@dataclass(frozen=True, eq=False)
class StepSchedule:
    """Which steps are run, what skipping the others costs, and the bytes that it reserves."""

    run: BoolArray
    depth: int
    price: float
    size: int


class DynamicProgramme:
    """The fronts of one problem, computed when first needed and shared by all budgets.

    Example:
        >>> programme = DynamicProgramme(problem)  # doctest: +SKIP
        >>> [programme.solve(budget).objective for budget in (40.0, 30.0, 20.0)]  # doctest: +SKIP
    """

    def __init__(self, problem: ScheduleProblem) -> None:
        self.problem = problem
        limited = problem.max_cache_bytes is not None
        self._depths = tuple(range(problem.history + 1)) if limited else (problem.history,)
        self._size_limit = np.inf if not limited else float(problem.max_cache_bytes or 0)
        self._group_fronts: dict[int, tuple[tuple[Front, ...], list[Options]]] = {}

    @cached_property
    def step_schedules(self) -> tuple[StepSchedule, ...]:
        """The schedules of the step unit that are tried, dearest (all steps run) first."""
        problem, unit = self.problem, self.problem.step_unit
        everything = np.ones(problem.num_steps, dtype=bool)
        if unit is None:
            return (StepSchedule(everything, 0, 0.0, 0),)
        found = [StepSchedule(everything, 0, 0.0, 0)]
        for depth in self._depths:
            front = solve_fronts(problem.price_of(unit)[None], depth)
            for count in range(problem.num_steps - 1, 0, -1):
                price = float(front.values[0, count])
                if np.isfinite(price):
                    size = unit.residual_bytes * (1 + depth) + unit.extra_bytes
                    found.append(StepSchedule(front.refreshes(0, count), depth, price, size))
        return tuple(found)

    @cached_property
    def smallest_budget_ms(self) -> float:
        """The least budget that any schedule tried here can meet."""
        least = np.inf
        for index, schedule in enumerate(self.step_schedules):
            room = self._size_limit - schedule.size
            if room < 0:
                continue
            groups = least_cost(self._options(index)[1], room) if self.problem.groups else 0.0
            least = min(least, self._spent(schedule) + groups)
        return least

    def solve(self, budget_ms: float) -> ScheduleSolution:
        """The best schedule within a budget.

        Raises:
            BudgetError: Nothing fits; the message gives the smallest feasible budget.
        """
        return self.candidates(budget_ms, 1)[0]

    def candidates(self, budget_ms: float, count: int | None = None) -> list[ScheduleSolution]:
        """The best schedule on each step schedule that is tried, least objective first.

        The lower bound of each is that of the whole problem.

        Args:
            budget_ms: The budget.
            count: Keep so many; None keeps all.

        Raises:
            BudgetError: Nothing fits; the message gives the smallest feasible budget.
        """
        ranked: list[tuple[float, int, Choice]] = []
        for index, schedule in enumerate(self.step_schedules):
            # Only the best one is asked for, and prices of groups are not negative.
            if count == 1 and ranked and schedule.price >= min(entry[0] for entry in ranked):
                continue
            choice = self._choose(index, budget_ms)
            if choice is not None:
                ranked.append((schedule.price + choice.error, index, choice))
        if not ranked:
            raise budget_error(self.problem.with_budget(budget_ms), self.smallest_budget_ms)
        ranked.sort(key=lambda entry: entry[:2])
        total, index, choice = ranked[0]
        if self.problem.step_unit is not None and self.problem.groups:
            limit = self.problem.with_budget(budget_ms).budget_limit
            bound = joint_bound(self.problem, _stack(self.problem), limit, total)
        elif self.problem.step_unit is not None:
            bound = total
        else:
            bound = choice.lower_bound
        return [
            self._solution(index, choice, budget_ms, bound) for _, index, choice in ranked[:count]
        ]

    def _spent(self, schedule: StepSchedule) -> float:
        unit = self.problem.step_unit
        step_ms = 0.0 if unit is None else unit.refresh_ms * int(schedule.run.sum())
        return self.problem.fixed_ms + step_ms

    def _choose(self, index: int, budget_ms: float) -> Choice | None:
        """The exact choice of all groups on the run steps of one step schedule."""
        schedule = self.step_schedules[index]
        limit = self.problem.with_budget(budget_ms).budget_limit - self._spent(schedule)
        room = self._size_limit - schedule.size
        if limit < 0 or room < 0:
            return None
        if not self.problem.groups:
            return Choice((), 0.0, 0.0)
        return solve_knapsack(self._options(index)[1], limit, room)

    def _options(self, index: int) -> tuple[tuple[Front, ...], list[Options]]:
        """Fronts of all groups on one step schedule, by depth, and their points as options."""
        if index not in self._group_fronts:
            run = np.flatnonzero(self.step_schedules[index].run)
            tables = compress(_stack(self.problem), run)
            fronts = tuple(solve_fronts(tables, depth) for depth in self._depths)
            options = [
                _front_options(unit, [front.values[row] for front in fronts], self._depths)
                for row, unit in enumerate(self.problem.groups)
            ]
            self._group_fronts[index] = (fronts, options)
        return self._group_fronts[index]

    def _solution(
        self, index: int, choice: Choice, budget_ms: float, bound: float
    ) -> ScheduleSolution:
        schedule = self.step_schedules[index]
        run = np.flatnonzero(schedule.run)
        refreshes: list[BoolArray] = []
        depths: list[int] = []
        row = 0
        for unit in self.problem.units:
            if unit.kind == "step":
                refreshes.append(schedule.run)
                depths.append(schedule.depth)
                continue
            level, count = divmod(choice.picks[row], len(run) + 1)
            mask = np.zeros(self.problem.num_steps, dtype=bool)
            mask[run[self._options(index)[0][level].refreshes(row, count)]] = True
            refreshes.append(mask)
            depths.append(self._depths[level])
            row += 1
        return build_solution(
            self.problem.with_budget(budget_ms), refreshes, depths, solver="dp", lower_bound=bound
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


def _stack(problem: ScheduleProblem) -> FloatArray:
    """The tables of all groups, padded with infinity to one shape."""
    tables = [problem.price_of(unit) for unit in problem.groups]
    lags = max(table.shape[1] for table in tables)
    columns = max(table.shape[2] for table in tables)
    stacked = np.full((len(tables), problem.num_steps, lags, columns), np.inf)
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
