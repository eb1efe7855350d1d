"""`dp`: exact per-unit fronts, joined by a multiple-choice knapsack.

Without a step unit the objective is a sum over units, and the units meet only in the budget and the
memory limit. `front.solve_fronts` gives each unit's least price for every time spent on it, and
`knapsack.solve_knapsack` picks one point of each front. Both are exact, so the result is optimal
and says so; should the knapsack run out of room, its certificate shows the gap.

With a step unit the groups live on the steps that are computed, so their fronts depend on which
steps are skipped. Exact here: the best plan of all groups on each step schedule that is tried;
without groups, or with at most `ALL_STEPS` steps, the whole problem. Heuristic beyond that: only
the step unit's own front is tried, which is right where groups are computed at every computed step.
No bound is stated then, nor where milliseconds had to be rounded (`front.weigh`).

What is tried does not depend on the budget, so many budgets share one pass, and a larger budget is
never worse.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from layercache.solver._front import Front, Weights, solve_fronts, weigh
from layercache.solver._knapsack import Choice, Options, least_cost, solve_knapsack
from layercache.solver._solution import ScheduleSolution, build_solution, price_of
from layercache.solver.problem import BoolArray, FloatArray, ScheduleProblem, budget_error

ALL_STEPS = 8


@dataclass(frozen=True, eq=False)
class _StepSchedule:
    """Which steps are computed, what skipping the others is priced, and the bytes it reserves."""

    run: BoolArray
    price: float
    size: int


@dataclass(frozen=True, eq=False)
class _GroupFront:
    """A group's front on the computed steps of one step schedule."""

    front: Front
    row: int
    weights: Weights
    options: Options


class DynamicProgramme:
    """The fronts of one problem, computed when first needed and shared by all budgets.

    Example:
        >>> programme = DynamicProgramme(problem)  # doctest: +SKIP
        >>> [programme.solve(budget).objective for budget in (40.0, 30.0, 20.0)]  # doctest: +SKIP
    """

    def __init__(self, problem: ScheduleProblem) -> None:
        self.problem = problem
        limit = problem.max_cache_bytes
        self._size_limit = np.inf if limit is None else float(limit)
        self._fronts: dict[int, list[_GroupFront]] = {}
        self._exact = True

    @cached_property
    def smallest_budget_ms(self) -> float:
        """The least budget that any schedule tried here can meet."""
        least = np.inf
        for index, schedule in enumerate(self._schedules):
            room = self._size_limit - schedule.size
            if room < 0:
                continue
            options = [part.options for part in self._groups(index)]
            least = min(least, self._spent(index) + (least_cost(options, room) if options else 0.0))
        return least

    def solve(self, budget_ms: float) -> ScheduleSolution:
        """The best schedule within a budget.

        Raises:
            BudgetError: Nothing fits; the message gives the smallest feasible budget.
        """
        return self.candidates(budget_ms, 1)[0]

    def candidates(self, budget_ms: float, count: int | None = None) -> list[ScheduleSolution]:
        """For each number of computed steps the best schedule, least objective first.

        Args:
            budget_ms: The budget.
            count: Keep so many; None keeps all.

        Raises:
            BudgetError: Nothing fits; the message gives the smallest feasible budget.
        """
        least: dict[int, tuple[float, int, Choice]] = {}
        floor = np.inf
        for index, schedule in enumerate(self._schedules):
            # Prices of groups are not negative, so these schedules cannot win any more.
            if count == 1 and any(schedule.price >= rival[0] for rival in least.values()):
                continue
            choice = self._choose(index, budget_ms)
            if choice is None:
                continue
            total = schedule.price + choice.error
            floor = min(floor, schedule.price + choice.lower_bound)
            number = int(schedule.run.sum())
            if number not in least or total < least[number][0]:
                least[number] = (total, index, choice)
        if not least:
            limited = self.problem.with_budget(budget_ms)
            raise budget_error(limited, self.smallest_budget_ms, proven=self._complete)
        ranked = sorted(least.values(), key=lambda entry: entry[:2])
        bound = floor if self._complete else None
        return [
            self._solution(index, choice, budget_ms, bound) for _, index, choice in ranked[:count]
        ]

    @property
    def _complete(self) -> bool:
        """Whether what is tried holds an optimum of the whole problem."""
        problem = self.problem
        joint = problem.step is not None and bool(problem.groups)
        return self._exact and (not joint or problem.num_steps <= ALL_STEPS)

    @cached_property
    def _schedules(self) -> list[_StepSchedule]:
        """The schedules of the step unit that are tried, all steps computed first."""
        problem, steps = self.problem, self.problem.num_steps
        everything: BoolArray = np.ones(steps, dtype=bool)
        found = [_StepSchedule(everything, 0.0, 0)]
        if problem.step is None:
            return found
        unit, prices = problem.units[problem.step], problem.prices[problem.step]
        masks: list[BoolArray]
        if steps <= ALL_STEPS:
            later = itertools.product((True, False), repeat=steps - 1)
            masks = [np.array((True, *mask)) for mask in later]
        else:
            # What a skipped step saves is its whole cost, with all groups.
            whole = np.sum([other.compute_ms for other in problem.units], axis=0)
            weights = self._weigh(whole)
            front = solve_fronts(prices[None], weights.parts)
            counts = np.flatnonzero(np.isfinite(front.values[0]))[::-1]
            masks = [front.computed(0, int(count)) for count in counts]
        for mask in masks:
            price = price_of(prices, mask, everything)
            if np.isfinite(price) and not mask.all():
                found.append(_StepSchedule(mask, price, unit.reserved(problem.history)))
        return found

    def _weigh(self, compute_ms: FloatArray) -> Weights:
        weights = weigh(compute_ms)
        self._exact &= weights.exact
        return weights

    def _spent(self, index: int) -> float:
        """Milliseconds of everything but the groups."""
        problem, run = self.problem, self._schedules[index].run
        own = 0.0 if problem.step is None else problem.units[problem.step].compute_ms[run].sum()
        return problem.fixed_ms + float(own)

    def _groups(self, index: int) -> list[_GroupFront]:
        """The fronts of all groups on one step schedule."""
        if index not in self._fronts:
            run = np.flatnonzero(self._schedules[index].run)
            units = [self.problem.units[group] for group in self.problem.groups]
            weights = [self._weigh(unit.compute_ms[run]) for unit in units]
            # Units of equal weights, and of equal tables, share one pass.
            shared: dict[tuple[bytes, tuple[int, ...]], list[int]] = {}
            tables = [compress(self.problem.prices[group], run) for group in self.problem.groups]
            for row, (weight, table) in enumerate(zip(weights, tables, strict=True)):
                shared.setdefault((weight.parts.tobytes(), table.shape), []).append(row)
            found: dict[int, _GroupFront] = {}
            for rows in shared.values():
                front = solve_fronts(
                    np.stack([tables[row] for row in rows]), weights[rows[0]].parts
                )
                for place, row in enumerate(rows):
                    options = self._options(row, front.values[place], weights[row])
                    found[row] = _GroupFront(front, place, weights[row], options)
            self._fronts[index] = [found[row] for row in range(len(units))]
        return self._fronts[index]

    def _options(self, row: int, values: FloatArray, weights: Weights) -> Options:
        unit = self.problem.units[self.problem.groups[row]]
        cost = np.arange(len(values)) * weights.part_ms
        size = np.full(len(values), float(unit.reserved(self.problem.history)))
        error = values.copy()
        # All computed: nothing is cached and nothing is kept.
        size[-1], error[-1] = 0.0, 0.0
        return Options(cost=cost, size=size, error=error)

    def _choose(self, index: int, budget_ms: float) -> Choice | None:
        """The exact choice of all groups on the computed steps of a step schedule."""
        limit = self.problem.with_budget(budget_ms).budget_limit - self._spent(index)
        room = self._size_limit - self._schedules[index].size
        if limit < 0 or room < 0:
            return None
        options = [part.options for part in self._groups(index)]
        return solve_knapsack(options, limit, room) if options else Choice((), 0.0, 0.0)

    def _solution(
        self, index: int, choice: Choice, budget_ms: float, bound: float | None
    ) -> ScheduleSolution:
        run = self._schedules[index].run
        masks = [run] * len(self.problem.units)
        steps = np.flatnonzero(run)
        groups = zip(self.problem.groups, choice.picks, self._groups(index), strict=True)
        for group, pick, part in groups:
            if pick + 1 < len(part.front.values[part.row]):
                mask: BoolArray = np.zeros(len(run), dtype=bool)
                mask[steps[part.front.computed(part.row, pick)]] = True
                masks[group] = mask
        return build_solution(
            self.problem.with_budget(budget_ms), masks, solver="dp", lower_bound=bound
        )


def solve(problem: ScheduleProblem) -> ScheduleSolution:
    """Solve by exact fronts and a knapsack; see the module's text.

    Raises:
        BudgetError: No schedule fits; the message gives the smallest feasible budget.
    """
    return DynamicProgramme(problem).solve(problem.budget_ms)


def compress(prices: FloatArray, run: np.ndarray) -> FloatArray:
    """Tables over the computed steps alone: position k stands for step run[k].

    (T, L, J+1) to (R, L, J+1); lags and spans count positions, prices still those of the true
    steps. Cells that reach further than the tables go are infinite.
    """
    steps, lags, columns = prices.shape
    if len(run) == steps:
        return prices
    k, i, j = np.ogrid[: len(run), :lags, :columns]
    anchor, base = k - 1 - i, k - 1 - i - j
    step = run[np.broadcast_to(k, (len(run), lags, columns))]
    anchor_step, base_step = run[np.maximum(anchor, 0)], run[np.maximum(base, 0)]
    lag, span = step - 1 - anchor_step, anchor_step - base_step
    usable = (base >= 0) & (lag < lags) & (span < columns)
    picked = prices[step, np.clip(lag, 0, lags - 1), np.clip(span, 0, columns - 1)]
    result: FloatArray = np.where(usable, picked, np.inf)
    return result
