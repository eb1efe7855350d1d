"""`ScheduleSolution`: what every solver returns, and how it follows from the computed steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from layercache.solver.problem import BoolArray, FloatArray, ScheduleProblem

Status = Literal["optimal", "feasible", "time_limit"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ScheduleSolution:
    """A schedule with what is known of it.

    Attributes:
        names: Of the units, in the problem's order.
        computed: (T, U) computed cells; False for a group at a skipped step.
        objective: Sum of the prices of all cached cells.
        cost_ms: Milliseconds spent, `fixed_ms` included.
        cache_bytes: Reserved bytes.
        status: `"optimal"` if objective and lower bound meet; `"feasible"` if not, or if there is
            no bound; `"time_limit"` if the solver was also stopped early.
        lower_bound: No schedule of this problem has a smaller objective; None if nothing is proven.
        solver: Name of the solver.
    """

    names: tuple[str, ...]
    computed: BoolArray
    objective: float
    cost_ms: float
    cache_bytes: int
    status: Status
    lower_bound: float | None
    solver: str

    def __str__(self) -> str:
        width = max(map(len, self.names))
        rows = [
            f"  {name:<{width}}  {''.join(np.where(row, '#', '-'))}"
            for name, row in zip(self.names, self.computed.T, strict=True)
        ]
        bound = "none" if self.lower_bound is None else f"{self.lower_bound:.6g}"
        head = (
            f"{self.solver}: objective {self.objective:.6g}, lower bound {bound} "
            f"({self.status}), {self.cost_ms:.4g} ms, {self.cache_bytes} bytes"
        )
        return "\n".join([head, *rows])


Solver = Callable[[ScheduleProblem], ScheduleSolution]


def price_of(prices: FloatArray, computed: BoolArray, run: BoolArray) -> float:
    """Least total price of a unit whose computed steps are given; infinite if it cannot be.

    Args:
        prices: (T, L, J+1).
        computed: (T,) computed steps, step 0 among them.
        run: (T,) steps at which the unit is not idle.
    """
    lags, spans = prices.shape[1], prices.shape[2] - 1
    done = np.flatnonzero(computed)
    cells = np.flatnonzero(run & ~computed)
    position = (np.cumsum(computed) - 1)[cells]
    anchors = done[position]
    lag = cells - 1 - anchors
    row = np.minimum(lag, lags - 1)
    best = np.where(lag < lags, prices[cells, row, 0], np.inf)
    span = anchors - done[np.maximum(position - 1, 0)]
    usable = (position >= 1) & (span <= spans) & (lag < lags)
    price = np.where(usable, prices[cells, row, np.minimum(span, spans)], np.inf)
    return float(np.minimum(best, price).sum())


def build_solution(
    problem: ScheduleProblem,
    masks: Sequence[BoolArray],
    *,
    solver: str,
    lower_bound: float | None,
    tolerance: float = 1e-9,
    time_limit: bool = False,
) -> ScheduleSolution:
    """Total the objective, cost and bytes of the computed steps of each unit, (T,) masks.

    The status is `"optimal"` if the relative gap is within `tolerance`.
    """
    run: BoolArray = np.ones(problem.num_steps, dtype=bool)
    if problem.step is not None:
        run = masks[problem.step]
    objective, cost, held, rows = 0.0, problem.fixed_ms, 0, []
    for unit, prices, mask in zip(problem.units, problem.prices, masks, strict=True):
        active = run if unit.kind == "group" else np.ones_like(run)
        computed = mask & active
        objective += price_of(prices, computed, active)
        cost += float(unit.compute_ms[computed].sum())
        if not computed[active].all():
            held += unit.reserved(problem.history)
        rows.append(computed)
    # Equal up to rounding counts as proven: both numbers are sums of the same prices.
    proven = lower_bound is not None and objective - lower_bound <= tolerance * abs(objective)
    return ScheduleSolution(
        names=tuple(unit.name for unit in problem.units),
        computed=np.array(rows).T,
        objective=float(objective),
        cost_ms=float(cost),
        cache_bytes=held,
        status="optimal" if proven else "time_limit" if time_limit else "feasible",
        lower_bound=None if lower_bound is None else float(min(lower_bound, objective)),
        solver=solver,
    )
