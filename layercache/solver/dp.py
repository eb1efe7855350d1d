"""`dp`: exact per-unit fronts, joined by a multiple-choice knapsack.

Without a step unit the objective is a sum over units, and the units meet only in the budget and the
memory limit. `front.solve_fronts` gives each unit's least price for every number of refreshes (and,
under a memory limit, for every depth of base), `knapsack.solve_knapsack` picks one point of each
front. Both are exact, so the result is optimal and says so; should the knapsack run out of room,
its certificate shows the gap.

With a step unit the groups live on the steps that are run, so their fronts depend on which steps
are skipped. Exact here: the best plan of all groups on the run steps of each step schedule that is
tried, and, without groups, the whole problem. Heuristic: only the schedules of
`steps.step_schedules` are tried, not all 2^(T-1). The lower bound (`bound.joint_bound`) covers all
of them.

The set of step schedules does not depend on the budget, so many budgets share one pass, and a
larger budget is never worse.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from layercache.solver.steps import StepSchedule, step_schedules


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
        """The schedules of the step unit that are tried, all steps run first."""
        return step_schedules(self.problem, self._tables, self._depths)

    @cached_property
    def _tables(self) -> FloatArray | None:
        return _stack(self.problem) if self.problem.groups else None

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
        """For each number of run steps the best schedule, least objective first.

        There may be two of one number: one that caches groups and one that does not. The lower
        bound of each is that of the whole problem.

        Args:
            budget_ms: The budget.
            count: Keep so many; None keeps all.

        Raises:
            BudgetError: Nothing fits; the message gives the smallest feasible budget.
        """
        least: dict[tuple[int, bool], tuple[float, int, Choice]] = {}
        for index, schedule in enumerate(self.step_schedules):
            # Prices of groups are not negative, so this schedule cannot win any more.
            if count == 1 and any(schedule.price >= rival[0] for rival in least.values()):
                continue
            choice = self._choose(index, budget_ms)
            if choice is None:
                continue
            run = int(schedule.run.sum())
            total = schedule.price + choice.error
            kind = run, any(pick % (run + 1) != run for pick in choice.picks)
            if kind not in least or total < least[kind][0]:
                least[kind] = (total, index, choice)
        if not least:
            raise budget_error(self.problem.with_budget(budget_ms), self.smallest_budget_ms)
        ranked = sorted(least.values(), key=lambda entry: entry[:2])
        bound = self._bound(budget_ms, ranked[0][0], ranked[0][2])
        return [
            self._solution(index, choice, budget_ms, bound) for _, index, choice in ranked[:count]
        ]

    def _bound(self, budget_ms: float, total: float, choice: Choice) -> float:
        """A lower bound of the whole problem, given its best known objective."""
        if self.problem.step_unit is None:
            return choice.lower_bound
        if self._tables is None:
            # The step unit alone: its front is exact and has been searched whole.
            return total
        limit = self.problem.with_budget(budget_ms).budget_limit
        return joint_bound(self.problem, self._tables, limit, total)

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
            assert self._tables is not None
            tables = compress(self._tables, run)
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
