"""`ScheduleProblem` and `ScheduleSolution`: what every solver reads and returns.

Shape suffixes: T steps, L lags of the anchor, J distances of the base behind the anchor.

A *unit* is refreshed (computed) or cached at each step. The *anchor* a of a cached cell (t, unit)
is the unit's last refresh before t. Its *base* b is none (the anchor is reused), or one of the H
refreshes before the anchor. The problem is

    minimise    sum over cached cells of price(t, a, b)
    subject to  fixed_ms + sum of refresh_ms over refreshed cells <= budget_ms
                reserved bytes <= max_cache_bytes
                every unit refreshed at step 0 and at the forced steps
                t - a <= max_gap at every cached cell.

With a *step unit*, the steps that it does not refresh are *skipped*: every group is idle there,
costs nothing, adds nothing to the objective and cannot be refreshed. At the other steps groups are
refreshed or cached as above, and the step unit's own `refresh_ms` is paid.

*Reserved bytes*: a unit that never predicts beyond depth d (its bases are among the d refreshes
before the anchor; d = 0 is reuse alone) keeps a ring of 1 + d residuals, and none if it is never
cached. Reserved bytes are the sum of all rings. A runtime that frees a residual after its last use
holds at most that; unlike the true peak over time, it does not couple the units, which is what
makes the problem solvable exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from layercache.errors import BudgetError, LayerCacheError

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]
BoolArray = NDArray[np.bool_]

BUDGET_RTOL = 1e-9
"""A cost counts as within the budget up to this relative excess: sums of milliseconds round."""


class ProblemError(LayerCacheError, ValueError):
    """A schedule problem is malformed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class UnitCosts:
    """One unit: what a refresh costs and what each way of caching a cell does to the output.

    Attributes:
        name: Identifies the unit.
        kind: `"group"`, or `"step"` for the whole transformer call.
        refresh_ms: Milliseconds of one refresh; for the step unit what a computed step spends
            outside the groups.
        residual_bytes: Bytes of one stored residual, all branches.
        extra_bytes: Further bytes held if the unit is cached anywhere.
        errors: (T, L, J+1) price of caching step t with anchor a = t-1-i and base b = a-j, at
            [t, i, j]; j = 0 is reuse of the anchor. Infinite where this is impossible.
    """

    name: str
    kind: Literal["group", "step"]
    refresh_ms: float
    residual_bytes: int
    errors: FloatArray
    extra_bytes: int = 0

    def __post_init__(self) -> None:
        errors = np.array(self.errors, dtype=np.float64)
        if errors.ndim != 3 or min(errors.shape) < 1:
            raise ProblemError(
                f"{self.name}: errors has shape {errors.shape}; it must be (T, L, J+1), all >= 1"
            )
        if np.isnan(errors).any() or (errors < 0).any():
            raise ProblemError(f"{self.name}: errors holds NaN or negative prices")
        if self.kind not in ("group", "step"):
            raise ProblemError(f"{self.name}: kind is {self.kind!r}; use 'group' or 'step'")
        if not 0 <= self.refresh_ms < np.inf:
            raise ProblemError(
                f"{self.name}: refresh_ms is {self.refresh_ms}; it must be finite and >= 0"
            )
        if self.residual_bytes < 0 or self.extra_bytes < 0:
            raise ProblemError(
                f"{self.name}: residual_bytes={self.residual_bytes}, "
                f"extra_bytes={self.extra_bytes}; neither may be negative"
            )
        steps, lags, spans = errors.shape
        t, i, j = np.ogrid[:steps, :lags, :spans]
        errors[np.broadcast_to(t - 1 - i - j < 0, errors.shape)] = np.inf
        errors.setflags(write=False)
        object.__setattr__(self, "errors", errors)


@dataclass(frozen=True, kw_only=True, eq=False)
class ScheduleProblem:
    """Steps x units x spans under a budget; validated once, so that solvers need not check.

    Args:
        sigmas: (T+1,) strictly falling noise levels.
        units: The units; at most one step unit.
        budget_ms: Milliseconds that may be spent in all.
        fixed_ms: Milliseconds that any plan spends in all.
        history: H, how many refreshes before the anchor may serve as base; 0 allows reuse alone.
        max_gap: Largest t - a of a cached cell; None leaves it to the tables.
        forced: Steps at which every unit is refreshed, besides step 0.
        power: Prices are raised to it; above 1 it suppresses peaks.
        max_cache_bytes: Limit on reserved bytes (see the module's text); None is no limit.

    Raises:
        ProblemError: A shape, a price, a step number or the sigmas are wrong.

    Example:
        >>> errors = np.ones((4, 3, 1))
        >>> unit = UnitCosts(
        ...     name="g", kind="group", refresh_ms=1.0, residual_bytes=8, errors=errors
        ... )
        >>> problem = ScheduleProblem(
        ...     sigmas=np.linspace(1, 0, 5), units=(unit,), budget_ms=2.0, history=1
        ... )
        >>> from layercache.solver import SOLVERS
        >>> SOLVERS["dp"](problem).objective
        2.0
    """

    sigmas: FloatArray
    units: tuple[UnitCosts, ...]
    budget_ms: float
    fixed_ms: float = 0.0
    history: int = 1
    max_gap: int | None = None
    forced: frozenset[int] = field(default_factory=frozenset)
    power: float = 1.0
    max_cache_bytes: int | None = None

    def __post_init__(self) -> None:
        sigmas = np.asarray(self.sigmas, dtype=np.float64)
        object.__setattr__(self, "sigmas", sigmas)
        object.__setattr__(self, "forced", frozenset(self.forced))
        if sigmas.ndim != 1 or len(sigmas) < 2 or not np.isfinite(sigmas).all():
            raise ProblemError(f"sigmas has shape {sigmas.shape}; it needs T+1 >= 2 finite values")
        if not (np.diff(sigmas) < 0).all():
            step = int(np.flatnonzero(np.diff(sigmas) >= 0)[0])
            raise ProblemError(
                f"sigmas must fall strictly; sigmas[{step}] is {sigmas[step]:g} and "
                f"sigmas[{step + 1}] is {sigmas[step + 1]:g}"
            )
        if not self.units:
            raise ProblemError("a problem needs at least one unit")
        for unit in self.units:
            if len(unit.errors) != self.num_steps:
                raise ProblemError(
                    f"{unit.name}: errors covers {len(unit.errors)} steps, sigmas {self.num_steps}"
                )
        if sum(unit.kind == "step" for unit in self.units) > 1:
            raise ProblemError("a problem has at most one step unit")
        if len({unit.name for unit in self.units}) != len(self.units):
            raise ProblemError(f"unit names repeat: {[unit.name for unit in self.units]}")
        if not 0 <= self.fixed_ms < np.inf or not self.budget_ms < np.inf:
            raise ProblemError(
                f"fixed_ms={self.fixed_ms}, budget_ms={self.budget_ms}: both must be finite, "
                "fixed_ms not negative"
            )
        if not 0 <= self.history <= 3:
            raise ProblemError(f"history is {self.history}; 0 to 3 refreshes can be kept")
        if self.max_gap is not None and self.max_gap < 0:
            raise ProblemError(f"max_gap is {self.max_gap}; it must be at least 0")
        if any(not 0 <= step < self.num_steps for step in self.forced):
            raise ProblemError(
                f"forced is {sorted(self.forced)}; steps are 0 to {self.num_steps - 1}"
            )
        if not self.power > 0:
            raise ProblemError(f"power is {self.power}; it must be above 0")
        if self.max_cache_bytes is not None and self.max_cache_bytes < 0:
            raise ProblemError(f"max_cache_bytes is {self.max_cache_bytes}; it must be at least 0")

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.sigmas) - 1

    @property
    def step_unit(self) -> UnitCosts | None:
        """The unit of the whole step, if there is one."""
        return next((unit for unit in self.units if unit.kind == "step"), None)

    @property
    def groups(self) -> tuple[UnitCosts, ...]:
        """The units of block groups, in order."""
        return tuple(unit for unit in self.units if unit.kind == "group")

    @property
    def budget_limit(self) -> float:
        """`budget_ms` with the tolerance on it."""
        return self.budget_ms + BUDGET_RTOL * abs(self.budget_ms)

    @cached_property
    def prices(self) -> tuple[FloatArray, ...]:
        """One (T, L, J+1) table a unit, with power, `max_gap` and forced steps worked in."""
        tables = []
        for unit in self.units:
            table = unit.errors**self.power
            if self.max_gap is not None:
                table[:, self.max_gap :] = np.inf
            table[[0, *sorted(self.forced)]] = np.inf
            table.setflags(write=False)
            tables.append(table)
        return tuple(tables)

    def with_budget(self, budget_ms: float) -> ScheduleProblem:
        """The same problem under another budget; the tables of `prices` are shared."""
        changed = replace(self, budget_ms=budget_ms)
        changed.__dict__["prices"] = self.prices
        return changed

    def price_of(self, unit: UnitCosts) -> FloatArray:
        """The table of `prices` that belongs to `unit`."""
        return self.prices[self.units.index(unit)]


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
    run = np.ones(problem.num_steps, dtype=bool)
    for unit, refresh in zip(problem.units, refreshes, strict=True):
        if unit.kind == "step":
            run = refresh
    schedules, objective, cost, held = [], 0.0, problem.fixed_ms, 0
    for unit, prices, refresh, depth in zip(
        problem.units, problem.prices, refreshes, depths, strict=True
    ):
        active = np.ones_like(run) if unit.kind == "step" else run
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


class InfeasibleBudgetError(BudgetError):
    """No schedule fits a budget. `smallest_ms` is the smallest budget that one fits."""

    def __init__(self, message: str, smallest_ms: float) -> None:
        super().__init__(message)
        self.smallest_ms = smallest_ms


def budget_error(problem: ScheduleProblem, smallest_ms: float) -> InfeasibleBudgetError:
    """The error for a budget below what any schedule costs."""
    smallest_ms = float(smallest_ms)
    limit = (
        ""
        if problem.max_cache_bytes is None
        else (f" within max_cache_bytes={problem.max_cache_bytes}")
    )
    if not np.isfinite(smallest_ms):
        return InfeasibleBudgetError(
            f"no schedule at all is feasible{limit}: too many forced or impossible cells; raise "
            "max_cache_bytes or max_gap",
            smallest_ms,
        )
    return InfeasibleBudgetError(
        f"budget_ms={problem.budget_ms!r} cannot be met{limit}: the smallest feasible budget is "
        f"{smallest_ms!r} ms; raise the budget to it, or allow longer gaps (more lags at "
        "calibration, a larger max_gap)",
        smallest_ms,
    )
