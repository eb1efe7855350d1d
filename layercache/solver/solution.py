"""`ScheduleSolution`: what every solver returns, and how it follows from the refreshed steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from layercache.solver.problem import BoolArray, FloatArray, IntArray, ScheduleProblem, UnitCosts


@dataclass(frozen=True, kw_only=True, eq=False)
class UnitSchedule:
    """One unit's cells: (T,) arrays; anchor and base are -1 where there is none.

    A cell that is neither refreshed nor has an anchor is idle (its step is skipped).
    """

    name: str
    refresh: BoolArray
    anchor: IntArray
    base: IntArray

    @property
    def cached(self) -> BoolArray:
        """(T,) whether the cell is reused or predicted."""
        result: BoolArray = self.anchor >= 0
        return result


Status = Literal["optimal", "feasible", "time_limit"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ScheduleSolution:
    """A schedule with its certificate.

    Attributes:
        units: One schedule a unit, in the problem's order.
        objective: Sum of the prices of all cached cells.
        cost_ms: Milliseconds spent, `fixed_ms` included.
        cache_bytes: Reserved bytes.
        status: `"optimal"` if objective and lower bound meet; `"feasible"` if the gap is open;
            `"time_limit"` if the solver was also stopped early.
        lower_bound: No schedule of this problem has a smaller objective.
        solver: Name of the solver.
    """

    units: tuple[UnitSchedule, ...]
    objective: float
    cost_ms: float
    cache_bytes: int
    status: Status
    lower_bound: float
    solver: str

    @property
    def gap(self) -> float:
        """(objective - lower bound) / objective; 0 for an objective of 0."""
        if self.objective <= 0:
            return 0.0
        return max(0.0, (self.objective - self.lower_bound) / self.objective)

    def __str__(self) -> str:
        width = max(len(unit.name) for unit in self.units)
        rows = []
        for unit in self.units:
            symbols = np.where(unit.refresh, "#", np.where(unit.cached, "-", "."))
            rows.append(f"  {unit.name:<{width}}  {''.join(symbols)}")
        head = (
            f"{self.solver}: objective {self.objective:.6g}, lower bound {self.lower_bound:.6g} "
            f"({self.status}), {self.cost_ms:.4g} ms, {self.cache_bytes} bytes"
        )
        return "\n".join([head, *rows])


Solver = Callable[[ScheduleProblem], ScheduleSolution]


def resolve_cells(
    prices: FloatArray, refresh: BoolArray, active: BoolArray, depth: int
) -> tuple[IntArray, IntArray, float]:
    """Anchors, cheapest bases and total price of a unit whose refreshes are given.

    Args:
        prices: (T, L, J+1).
        refresh: (T,) refreshed steps, step 0 among them.
        active: (T,) steps at which the unit is not idle.
        depth: How many refreshes before the anchor may serve as base.

    Returns:
        anchor (T,), base (T,), and the total, infinite if a cell cannot be cached so. Among equal
        prices the shallowest base is taken.
    """
    lags, spans = prices.shape[1], prices.shape[2] - 1
    anchor = np.full(len(refresh), -1)
    base = np.full(len(refresh), -1)
    refreshes = np.flatnonzero(refresh)
    cells = np.flatnonzero(active & ~refresh)
    if not len(cells):
        return anchor, base, 0.0
    position = (np.cumsum(refresh) - 1)[cells]
    anchors = refreshes[position]
    lag = cells - 1 - anchors
    row = np.minimum(lag, lags - 1)
    best = np.where(lag < lags, prices[cells, row, 0], np.inf)
    bases = np.full(len(cells), -1)
    for back in range(1, depth + 1):
        candidate = refreshes[np.maximum(position - back, 0)]
        span = anchors - candidate
        usable = (position >= back) & (span <= spans) & (lag < lags)
        price = np.where(usable, prices[cells, row, np.minimum(span, spans)], np.inf)
        bases = np.where(price < best, candidate, bases)
        best = np.minimum(price, best)
    anchor[cells], base[cells] = anchors, bases
    return anchor, base, float(best.sum())


def build_solution(
    problem: ScheduleProblem,
    refreshes: Sequence[BoolArray],
    depths: Sequence[int],
    *,
    solver: str,
    lower_bound: float,
    tolerance: float = 1e-9,
    time_limit: bool = False,
) -> ScheduleSolution:
    """Resolve the cells of given refreshes and total their objective, cost and bytes.

    `refreshes` has one (T,) mask a unit, `depths` the deepest base that each unit may use. The
    status is `"optimal"` if the relative gap is within `tolerance`.
    """
    everything = np.ones(problem.num_steps, dtype=bool)
    run = [everything] * len(problem.units)
    for family in problem.families:
        if family.step is not None:
            for group in family.groups:
                run[group] = refreshes[family.step]
    schedules, objective, cost, held = [], 0.0, problem.fixed_ms, 0
    for unit, prices, refresh, active, depth in zip(
        problem.units, problem.prices, refreshes, run, depths, strict=True
    ):
        anchor, base, price = resolve_cells(prices, refresh & active, active, depth)
        schedules.append(
            UnitSchedule(name=unit.name, refresh=refresh & active, anchor=anchor, base=base)
        )
        objective += price
        cost += unit.refresh_ms * int((refresh & active).sum())
        held += reserved_bytes(unit, schedules[-1])
    # Equal up to rounding counts as proven: both numbers are sums of the same prices.
    proven = objective - lower_bound <= tolerance * abs(objective)
    return ScheduleSolution(
        units=tuple(schedules),
        objective=float(objective),
        cost_ms=float(cost),
        cache_bytes=held,
        status="optimal" if proven else "time_limit" if time_limit else "feasible",
        lower_bound=float(min(lower_bound, objective)),
        solver=solver,
    )


def reserved_bytes(unit: UnitCosts, schedule: UnitSchedule) -> int:
    """The ring of residuals that a schedule of this unit needs, in bytes."""
    if not schedule.cached.any():
        return 0
    count = np.cumsum(schedule.refresh)
    predicted = np.flatnonzero(schedule.base >= 0)
    depth: IntArray = count[schedule.anchor[predicted]] - count[schedule.base[predicted]]
    return unit.residual_bytes * (1 + int(depth.max(initial=0))) + unit.extra_bytes
