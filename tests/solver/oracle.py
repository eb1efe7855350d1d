"""Brute force over all schedules of a small problem, straight from the problem's definition."""

from __future__ import annotations

import itertools

import numpy as np

from layercache.solver import ScheduleProblem, UnitCosts

Row = tuple[float, float, float]


def _cell(
    problem: ScheduleProblem, unit: UnitCosts, refreshes: list[int], t: int, depth: int
) -> float:
    """Cheapest price of a cached cell, infinite if it cannot be cached."""
    past = [r for r in refreshes if r < t]
    anchor = past[-1]
    if t in problem.forced or (problem.max_gap is not None and t - anchor > problem.max_gap):
        return np.inf
    best = np.inf
    for base in [anchor, *past[:-1][::-1][:depth]]:
        i, j = t - 1 - anchor, anchor - base
        if i < unit.errors.shape[1] and j < unit.errors.shape[2]:
            best = min(best, float(unit.errors[t, i, j]) ** problem.power)
    return best


def _rows(
    problem: ScheduleProblem, unit: UnitCosts, active: list[int], *, only: set[int] | None = None
) -> list[Row]:
    """(cost, bytes, price) of every schedule of one unit on its active steps."""
    rows = []
    later = [t for t in active if t > 0]
    for size in range(len(later) + 1):
        for chosen in itertools.combinations(later, size):
            if only is not None and {0, *chosen} != only:
                continue
            refreshes = [0, *chosen]
            cached = [t for t in later if t not in chosen]
            for depth in range(problem.history + 1):
                price = sum(_cell(problem, unit, refreshes, t, depth) for t in cached)
                held = unit.residual_bytes * (1 + depth) + unit.extra_bytes if cached else 0
                if np.isfinite(price):
                    rows.append((unit.refresh_ms * len(refreshes), float(held), price))
    return rows


def _combine(tables: list[list[Row]], cost: float, held: float) -> list[Row]:
    """The least total price for every cost and number of bytes within the limits."""
    states = {(0.0, 0.0): 0.0}
    for table in tables:
        merged: dict[tuple[float, float], float] = {}
        for (c, b), price in states.items():
            for c2, b2, price2 in table:
                key = (c + c2, b + b2)
                if key[0] <= cost + 1e-6 and key[1] <= held:
                    merged[key] = min(merged.get(key, np.inf), price + price2)
        states = merged
    return [(c, b, price) for (c, b), price in states.items()]


def _branch(problem: ScheduleProblem, step: UnitCosts, room: float, held: float) -> list[Row]:
    """The same of a step unit and the groups that sit out its skipped steps."""
    steps = list(range(problem.num_steps))
    groups = [u for u in problem.groups if step.branch in ("", u.branch)]
    rows = []
    for size in range(len(steps)):
        for chosen in itertools.combinations(steps[1:], size):
            run = [0, *chosen]
            if set(problem.forced) <= set(run):
                own = _rows(problem, step, steps, only=set(run))
                others = [_rows(problem, u, run) for u in groups]
                rows += _combine([own, *others], room, held)
    return rows


def optimum(problem: ScheduleProblem) -> float:
    """Least objective over all schedules, infinite if none is feasible."""
    held = np.inf if problem.max_cache_bytes is None else float(problem.max_cache_bytes)
    room = problem.budget_ms - problem.fixed_ms
    whole = [u for u in problem.units if u.kind == "step"]
    skipped = {u.branch for u in whole}
    free = [u for u in problem.groups if "" not in skipped and u.branch not in skipped]
    tables = [_rows(problem, u, list(range(problem.num_steps))) for u in free]
    tables += [_branch(problem, u, room, held) for u in whole]
    return min((price for _, _, price in _combine(tables, room, held)), default=np.inf)


def front(problem: ScheduleProblem, unit: UnitCosts) -> dict[int, float]:
    """Least price of one unit by its number of refreshes."""
    found: dict[int, float] = {}
    for cost, _, price in _rows(problem, unit, list(range(problem.num_steps))):
        count = round(cost / unit.refresh_ms)
        found[count] = min(found.get(count, np.inf), price)
    return found
