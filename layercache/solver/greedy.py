"""`greedy`: the published budget allocator, in one documented form.

Start from full compute. While the budget is exceeded, cache the cell that adds the least price for
each millisecond saved: with Delta the change of the whole objective (the cell's own price and what
changes at the cells that it was an anchor or a base of),

    next cell = argmin over refreshed cells of  Delta(t, unit) / milliseconds(t, unit).

Skipping a step is a move of the same kind: it caches the step unit's cell, makes every group idle
there, and saves the milliseconds of all that was computed.

*Lazy re-evaluation* (Minoux 1978): a priority queue holds ratios that may be out of date; the head
is re-evaluated, and taken if no other entry is smaller, else put back. That picks the true minimum
as long as ratios only grow; where one shrinks, its cell is found later than it could have been.

Work is O(c log n) evaluations for n cells, c of them cached, with O(L) table look-ups each. No
bound comes with it: the lower bound given is 0. Greedy can run into a dead end, where every further
move is impossible although `dp` finds a schedule; it raises then. A memory limit is met by a
heuristic: the unit with the largest ring loses a level until the rings fit.

Source: the greedy allocation over (timestep, group, span) of LayerCache (arXiv 2604.16492), whose
code is not public. Deviations: Delta counts the effect on later cells, the span is the cheapest one
of each cell instead of one for each group, and units have unequal costs.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left

import numpy as np

from layercache.solver.problem import FloatArray, InfeasibleBudgetError, ScheduleProblem
from layercache.solver.solution import ScheduleSolution, build_solution

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
    # Depth -1 marks a unit that must never be cached.
    depths = [problem.history] * len(problem.units)
    while True:
        solution = _solve(problem, depths)
        limit = problem.max_cache_bytes
        if limit is None or solution.cache_bytes <= limit:
            return solution
        rings = [
            (unit.residual_bytes * (1 + depth) + unit.extra_bytes) if depth >= 0 else -1
            for unit, depth in zip(problem.units, depths, strict=True)
        ]
        depths[int(np.argmax(rings))] -= 1


class _Row:
    """One unit's refreshes and the price of any stretch of its cells, in plain Python numbers."""

    def __init__(self, table: FloatArray, milliseconds: float, depth: int) -> None:
        # A memory view yields Python floats and, unlike nested lists, costs nothing to make.
        self.table = np.ascontiguousarray(table).data
        self.lags, self.spans = table.shape[1], table.shape[2] - 1
        self.milliseconds = milliseconds
        self.depth = depth
        # The sentinel T ends the last segment.
        self.refreshes = list(range(len(table) + 1))

    def price(self, refreshes: list[int], first: int, stop: int, run: list[bool]) -> float:
        """Price of all cells whose anchor is one of refreshes[first:stop]."""
        total, table = 0.0, self.table
        for position in range(first, stop):
            anchor, end = refreshes[position], refreshes[position + 1]
            if end == anchor + 1:
                continue
            spans = [0]
            for back in range(1, min(self.depth, position) + 1):
                span = anchor - refreshes[position - back]
                if span <= self.spans:
                    spans.append(span)
            for step in range(anchor + 1, end):
                if run[step]:
                    if step - anchor > self.lags:
                        return _INF
                    lag = step - 1 - anchor
                    total += min([table[step, lag, span] for span in spans])
        return total

    def change(self, step: int, run: list[bool], after: list[bool]) -> float:
        """Change of the price if `step` is no longer refreshed, and `run` becomes `after`."""
        refreshes, depth = self.refreshes, max(self.depth, 0)
        position = bisect_left(refreshes, step)
        if refreshes[position] != step:
            # The cell is cached: its price falls away, since the step is skipped.
            only = [False] * len(run)
            only[step] = True
            low = max(position - 1 - depth, 0)
            near = refreshes[low : position + 1]
            return -self.price(near, len(near) - 2, len(near) - 1, only)
        low = max(position - 1 - depth, 0)
        near = refreshes[low : position + depth + 2]
        first, stop = position - 1 - low, len(near) - 1
        before = self.price(near, first, stop, run)
        del near[position - low]
        return self.price(near, first, stop - 1, after) - before


def _solve(problem: ScheduleProblem, depths: list[int]) -> ScheduleSolution:
    steps = problem.num_steps
    rows = [
        _Row(table, unit.refresh_ms, depth)
        for unit, table, depth in zip(problem.units, problem.prices, depths, strict=True)
    ]
    everything = [True] * steps
    # The groups of each step unit, and the steps that each unit's family runs.
    governed = {f.step: f.groups for f in problem.families if f.step is not None}
    runs = {unit: everything for unit in range(len(rows))}
    for groups in governed.values():
        shared = list(everything)
        runs.update((group, shared) for group in groups)

    def evaluate(index: int, step: int) -> tuple[float, float]:
        """Price per millisecond of one move, and the milliseconds that it saves."""
        row = rows[index]
        if row.depth < 0:
            return _INF, 0.0
        run = runs[index]
        saved, added = row.milliseconds, row.change(step, run, run)
        for other in governed.get(index, ()):
            group, run = rows[other], runs[other]
            if added < _INF:
                added += group.change(step, run, [*run[:step], False, *run[step + 1 :]])
                if _has(group.refreshes, step):
                    saved += group.milliseconds
        return (added / saved if saved > 0 else _INF), saved

    cost = problem.fixed_ms + steps * sum(unit.refresh_ms for unit in problem.units)
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
        rows[index].refreshes.remove(step)
        for other in governed.get(index, ()):
            runs[other][step] = False
            if _has(rows[other].refreshes, step):
                rows[other].refreshes.remove(step)
    masks = []
    for row in rows:
        mask = np.zeros(steps, dtype=bool)
        mask[row.refreshes[:-1]] = True
        masks.append(mask)
    return build_solution(
        problem, masks, [max(depth, 0) for depth in depths], solver="greedy", lower_bound=0.0
    )


def _has(refreshes: list[int], step: int) -> bool:
    return refreshes[bisect_left(refreshes, step)] == step
