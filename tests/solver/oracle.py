"""Brute force over all schedules of a small problem, straight from the problem's definition."""

from __future__ import annotations

import itertools

import numpy as np

from layercache.solver import ScheduleProblem, UnitCosts

Row = tuple[float, float, float]


def _cell(problem: ScheduleProblem, unit: UnitCosts, computed: list[int], t: int) -> float:
    """Cheapest price of a cached cell, infinite if it cannot be cached."""
    past = [r for r in computed if r < t]
    anchor = past[-1]
    if t in problem.forced or (problem.max_gap is not None and t - anchor > problem.max_gap):
        return np.inf
    best = np.inf
    for base in [anchor, *past[:-1][::-1][: problem.history]]:
        i, j = t - 1 - anchor, anchor - base
        if i < unit.errors.shape[1] and j < unit.errors.shape[2]:
            best = min(best, float(unit.errors[t, i, j]))
    return best


def rows(
    problem: ScheduleProblem, unit: UnitCosts, active: list[int], *, only: set[int] | None = None
) -> list[Row]:
    """(cost, bytes, price) of every schedule of one unit on its active steps."""
    found = []
    later = [t for t in active if t > 0]
    for size in range(len(later) + 1):
        for chosen in itertools.combinations(later, size):
            if only is not None and {0, *chosen} != only:
                continue
            computed = [0, *chosen]
            cached = [t for t in later if t not in chosen]
            price = sum(_cell(problem, unit, computed, t) for t in cached)
            held = unit.residual_bytes * (1 + problem.history) + unit.extra_bytes if cached else 0
            if np.isfinite(price):
                cost = sum(float(unit.compute_ms[t]) for t in computed)
                found.append((cost, float(held), price))
    return found


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


def optimum(problem: ScheduleProblem) -> float:
    """Least objective over all schedules, infinite if none is feasible."""
    held = np.inf if problem.max_cache_bytes is None else float(problem.max_cache_bytes)
    room = problem.budget_ms - problem.fixed_ms
    steps = list(range(problem.num_steps))
    groups = [unit for unit in problem.units if unit.kind == "group"]
    whole = [unit for unit in problem.units if unit.kind == "step"]
    if not whole:
        tables = [rows(problem, unit, steps) for unit in groups]
        return min((price for *_, price in _combine(tables, room, held)), default=np.inf)
    best = np.inf
    for size in range(len(steps)):
        for chosen in itertools.combinations(steps[1:], size):
            run = [0, *chosen]
            if set(problem.forced) <= set(run):
                own = rows(problem, whole[0], steps, only=set(run))
                others = [rows(problem, unit, run) for unit in groups]
                found = _combine([own, *others], room, held)
                best = min([best, *(price for *_, price in found)])
    return best


def front(problem: ScheduleProblem, unit: UnitCosts) -> dict[float, float]:
    """Least price of one unit by what its computed steps cost."""
    found: dict[float, float] = {}
    for cost, _, price in rows(problem, unit, list(range(problem.num_steps))):
        found[cost] = min(found.get(cost, np.inf), price)
    return found
