"""`greedy`: the published budget allocator, in one documented form.

Start from full compute. While the budget is exceeded, cache the cell that adds the least price for
each millisecond saved: with Delta the change of the whole objective (the cell's own price and what
changes at the cells that it was an anchor or a base of),

    next cell = argmin over computed cells of  Delta(t, unit) / milliseconds(t, unit).

Skipping a step is a move of the same kind: it caches the step unit's cell, makes every group idle
there, and saves the milliseconds of all that was computed.

*Lazy re-evaluation* (Minoux 1978): a priority queue holds ratios that may be out of date; the head
is re-evaluated, and taken if no other entry is smaller, else put back. That picks the true minimum
as long as ratios only grow; where one shrinks, its cell is found later than it could have been.

Work is O(c log n) evaluations for n cells, c of them cached, with O(L) table look-ups each. No
bound comes with it. Greedy can run into a dead end, where every further
move is impossible although `dp` finds a schedule; it raises then. A memory limit is met by a
heuristic: units are kept from being cached, the one that reserves most first, until the rest fit.

Source: the greedy allocation over (timestep, group, span) of LayerCache (arXiv 2604.16492), whose
code is not public. Deviations: Delta counts the effect on later cells, each cell reuses or
predicts, whichever is cheaper, instead of one span for each group, and units have unequal costs.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left

import numpy as np

from layercache.solver._solution import ScheduleSolution, build_solution
from layercache.solver.problem import FloatArray, InfeasibleBudgetError, ScheduleProblem

_INF = float("inf")


def solve(problem: ScheduleProblem) -> ScheduleSolution:
    """Solve greedily; see the module's text.

    Raises:
        BudgetError: The moves ran out before the budget was met within the memory limit; the
            message gives a budget that greedy can meet.
    """
    try:
        return _within_bytes(problem)
    except InfeasibleBudgetError as error:
        smallest = error.smallest_ms
    # With a memory limit even the cost at which the moves ran out may be out of reach.
    while True:
        try:
            _within_bytes(problem.with_budget(smallest))
            break
        except InfeasibleBudgetError as error:
            smallest = error.smallest_ms
    raise InfeasibleBudgetError(
        f"greedy ran out of moves at {smallest!r} ms, above budget_ms={problem.budget_ms!r}: "
        'raise the budget, or use solver="dp"',
        smallest,
    )


def _within_bytes(problem: ScheduleProblem) -> ScheduleSolution:
    banned: set[int] = set()
    while True:
        solution = _solve(problem, banned)
        limit = problem.max_cache_bytes
        if limit is None or solution.cache_bytes <= limit:
            return solution
        sizes = [
            unit.reserved(problem.history) if index not in banned else -1
            for index, unit in enumerate(problem.units)
        ]
        banned.add(int(np.argmax(sizes)))


class _Row:
    """One unit's done and the price of any stretch of its cells, in plain Python numbers."""

    def __init__(self, table: FloatArray, milliseconds: FloatArray) -> None:
        # A memory view yields Python floats and, unlike nested lists, costs nothing to make.
        self.table = np.ascontiguousarray(table).data
        self.lags, self.spans = table.shape[1], table.shape[2] - 1
        self.milliseconds = milliseconds.tolist()
        # The sentinel T ends the last segment.
        self.done = list(range(len(table) + 1))

    def price(self, done: list[int], first: int, stop: int, run: list[bool]) -> float:
        """Price of all cells whose anchor is one of done[first:stop]."""
        total, table = 0.0, self.table
        for position in range(first, stop):
            anchor, end = done[position], done[position + 1]
            if end == anchor + 1:
                continue
            span = anchor - done[position - 1] if position else 0
            spans = [0, span] if 0 < span <= self.spans else [0]
            for step in range(anchor + 1, end):
                if run[step]:
                    if step - anchor > self.lags:
                        return _INF
                    lag = step - 1 - anchor
                    total += min([table[step, lag, span] for span in spans])
        return total

    def change(self, step: int, run: list[bool], after: list[bool]) -> float:
        """Change of the price if `step` is no longer computed, and `run` becomes `after`."""
        done = self.done
        position = bisect_left(done, step)
        if done[position] != step:
            # The cell is cached: its price falls away, since the step is skipped.
            only = [False] * len(run)
            only[step] = True
            low = max(position - 2, 0)
            near = done[low : position + 1]
            return -self.price(near, len(near) - 2, len(near) - 1, only)
        low = max(position - 2, 0)
        near = done[low : position + 3]
        first, stop = position - 1 - low, len(near) - 1
        before = self.price(near, first, stop, run)
        del near[position - low]
        return self.price(near, first, stop - 1, after) - before


def _solve(problem: ScheduleProblem, banned: set[int]) -> ScheduleSolution:
    steps = problem.num_steps
    rows = [
        _Row(table, unit.compute_ms)
        for unit, table in zip(problem.units, problem.prices, strict=True)
    ]
    everything, shared = [True] * steps, [True] * steps
    # The groups that sit out what the step unit skips, and the steps that each unit may compute.
    governed = {} if problem.step is None else {problem.step: problem.groups}
    runs = [everything if index in governed else shared for index in range(len(rows))]

    def evaluate(index: int, step: int) -> tuple[float, float]:
        """Price per millisecond of one move, and the milliseconds that it saves."""
        if index in banned:
            return _INF, 0.0
        row, run = rows[index], runs[index]
        saved, added = row.milliseconds[step], row.change(step, run, run)
        for other in governed.get(index, ()):
            group, run = rows[other], runs[other]
            if added < _INF:
                added += group.change(step, run, [*run[:step], False, *run[step + 1 :]])
                if _has(group.done, step):
                    saved += group.milliseconds[step]
        return (added / saved if saved > 0 else _INF), saved

    cost = problem.fixed_ms + sum(float(unit.compute_ms.sum()) for unit in problem.units)
    queue = []
    for index in range(len(rows)):
        for step in range(1, steps):
            ratio = evaluate(index, step)[0] if cost > problem.budget_limit else _INF
            if ratio < _INF:
                queue.append((ratio, step, index))
    heapq.heapify(queue)
    while cost > problem.budget_limit:
        if not queue:
            raise InfeasibleBudgetError("greedy ran out of moves", cost)
        _, step, index = heapq.heappop(queue)
        if not runs[index][step]:
            continue
        ratio, saved = evaluate(index, step)
        if ratio == _INF:
            continue
        if queue and ratio > queue[0][0]:
            heapq.heappush(queue, (ratio, step, index))
            continue
        cost -= saved
        rows[index].done.remove(step)
        for other in governed.get(index, ()):
            shared[step] = False
            if _has(rows[other].done, step):
                rows[other].done.remove(step)
    masks = []
    for row in rows:
        mask = np.zeros(steps, dtype=bool)
        mask[row.done[:-1]] = True
        masks.append(mask)
    return build_solution(problem, masks, solver="greedy", lower_bound=None)


def _has(done: list[int], step: int) -> bool:
    return done[bisect_left(done, step)] == step
