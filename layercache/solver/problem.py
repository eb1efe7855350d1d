"""`ScheduleProblem`: what every solver reads.

Shape suffixes: T steps, L lags of the anchor, J distances of the base behind the anchor.

A *unit* is computed or cached at each step. The *anchor* a of a cached cell (t, unit) is the unit's
last computed step before t. Its *base* b is none (the anchor is reused), or the computed step
before the anchor. The problem is

    minimise    sum over cached cells of price(t, a, b)
    subject to  fixed_ms + sum of compute_ms[t] over computed cells <= budget_ms
                reserved bytes <= max_cache_bytes
                every unit computed at step 0 and at the forced steps
                t - a <= max_gap at every cached cell.

With a *step unit*, the steps that it does not compute are *skipped*: every group is idle there,
costs nothing and adds nothing to the objective. At the other steps groups are computed or cached as
above, and the step unit's own `compute_ms` is paid.

*Reserved bytes*: a unit keeps its anchor and, where `history` is 1, the value before it, and none
if it is never cached. Unlike the true peak over time, which is at most that, it does not couple the
units, which is what makes the problem solvable exactly.
"""

from __future__ import annotations

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
    """One unit: what computing it costs and what caching a cell does to the output.

    Attributes:
        name: Identifies the unit.
        kind: `"group"`, or `"step"` for the whole transformer call.
        compute_ms: (T,) milliseconds of computing each step; for the step unit what a computed step
            spends outside the groups. One number stands for T equal ones.
        residual_bytes: Bytes of one stored value, all branches.
        extra_bytes: Further bytes held if the unit is cached anywhere.
        errors: (T, L, J+1) price of caching step t with anchor a = t-1-i and base b = a-j, at
            [t, i, j]; j = 0 is reuse of the anchor. Infinite where this is impossible.
    """

    name: str
    kind: Literal["group", "step"]
    compute_ms: FloatArray
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
        try:
            times = np.array(np.broadcast_to(self.compute_ms, len(errors)), dtype=np.float64)
        except ValueError as error:
            raise ProblemError(
                f"{self.name}: compute_ms has shape {np.shape(self.compute_ms)} for "
                f"{len(errors)} steps"
            ) from error
        if not np.isfinite(times).all() or (times < 0).any():
            raise ProblemError(f"{self.name}: compute_ms is {times}; it must be finite and >= 0")
        if self.residual_bytes < 0 or self.extra_bytes < 0:
            raise ProblemError(
                f"{self.name}: residual_bytes={self.residual_bytes}, "
                f"extra_bytes={self.extra_bytes}; neither may be negative"
            )
        steps, lags, spans = errors.shape
        t, i, j = np.ogrid[:steps, :lags, :spans]
        errors[np.broadcast_to(t - 1 - i - j < 0, errors.shape)] = np.inf
        for name, value in (("errors", errors), ("compute_ms", times)):
            value.setflags(write=False)
            object.__setattr__(self, name, value)

    def reserved(self, history: int) -> int:
        """Bytes that the unit keeps if it is cached anywhere."""
        return self.residual_bytes * (1 + history) + self.extra_bytes


@dataclass(frozen=True, kw_only=True, eq=False)
class ScheduleProblem:
    """Steps x units under a budget; validated once, so that solvers need not check.

    Args:
        units: The units, all of T steps; at most one is a step unit.
        budget_ms: Milliseconds that may be spent in all.
        fixed_ms: Milliseconds that any schedule spends.
        history: 1 if the computed step before the anchor may serve as base, 0 for reuse alone.
        max_gap: Largest t - a of a cached cell; None leaves it to the tables.
        forced: Steps at which every unit is computed, besides step 0.
        max_cache_bytes: Limit on reserved bytes (see the module's text); None is no limit.

    Raises:
        ProblemError: A shape, a price or a step number is wrong.

    Example:
        >>> errors = np.ones((4, 3, 1))
        >>> unit = UnitCosts(
        ...     name="g", kind="group", compute_ms=1.0, residual_bytes=8, errors=errors
        ... )
        >>> from layercache.solver import SOLVERS
        >>> SOLVERS["dp"](ScheduleProblem(units=(unit,), budget_ms=2.0)).objective
        2.0
    """

    units: tuple[UnitCosts, ...]
    budget_ms: float
    fixed_ms: float = 0.0
    history: int = 1
    max_gap: int | None = None
    forced: frozenset[int] = field(default_factory=frozenset)
    max_cache_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.units:
            raise ProblemError("a problem needs at least one unit")
        for unit in self.units:
            if len(unit.errors) != self.num_steps:
                raise ProblemError(
                    f"{unit.name}: errors covers {len(unit.errors)} steps, "
                    f"{self.units[0].name} {self.num_steps}"
                )
        if sum(unit.kind == "step" for unit in self.units) > 1:
            raise ProblemError("units holds more than one step unit")
        if len({unit.name for unit in self.units}) != len(self.units):
            raise ProblemError(f"unit names repeat: {[unit.name for unit in self.units]}")
        if not 0 <= self.fixed_ms < np.inf or not self.budget_ms < np.inf:
            raise ProblemError(
                f"fixed_ms={self.fixed_ms}, budget_ms={self.budget_ms}: both must be finite, "
                "fixed_ms not negative"
            )
        if self.history not in (0, 1):
            raise ProblemError(f"history is {self.history}; it is 0 or 1")
        for name in ("max_gap", "max_cache_bytes"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ProblemError(f"{name} is {value}; it must be at least 0")
        if any(not 0 <= step < self.num_steps for step in self.forced):
            raise ProblemError(
                f"forced is {sorted(self.forced)}; steps are 0 to {self.num_steps - 1}"
            )

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.units[0].errors)

    @property
    def step(self) -> int | None:
        """Position of the step unit, if there is one."""
        found = [index for index, unit in enumerate(self.units) if unit.kind == "step"]
        return found[0] if found else None

    @property
    def groups(self) -> tuple[int, ...]:
        """Positions of the units of block groups, in order."""
        return tuple(index for index, unit in enumerate(self.units) if unit.kind == "group")

    @property
    def budget_limit(self) -> float:
        """`budget_ms` with the tolerance on it."""
        return self.budget_ms + BUDGET_RTOL * abs(self.budget_ms)

    @cached_property
    def prices(self) -> tuple[FloatArray, ...]:
        """One (T, L, J+1) table a unit, with history, `max_gap` and forced steps worked in."""
        tables = []
        for unit in self.units:
            table = unit.errors.copy()
            if self.history == 0:
                table = table[:, :, :1]
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


class InfeasibleBudgetError(BudgetError):
    """No schedule fits a budget.

    Attributes:
        smallest_ms: The smallest budget that one fits, as far as the solver knows.
        proven: Whether it is known that none fits a smaller one.
    """

    def __init__(self, message: str, smallest_ms: float, *, proven: bool = False) -> None:
        super().__init__(message)
        self.smallest_ms = smallest_ms
        self.proven = proven


def budget_error(
    problem: ScheduleProblem, smallest_ms: float, *, proven: bool = True
) -> InfeasibleBudgetError:
    """The error for a budget below `smallest_ms`, the least cost of any schedule (found)."""
    smallest_ms = float(smallest_ms)
    limit = problem.max_cache_bytes
    within = "" if limit is None else f" within max_cache_bytes={limit}"
    if not np.isfinite(smallest_ms):
        return InfeasibleBudgetError(
            f"no schedule at all is feasible{within}: too many forced or impossible cells; raise "
            "max_cache_bytes or max_gap",
            smallest_ms,
            proven=proven,
        )
    smallest = "smallest feasible budget" if proven else "smallest budget found to be feasible"
    return InfeasibleBudgetError(
        f"budget_ms={problem.budget_ms!r} cannot be met{within}: the {smallest} is "
        f"{smallest_ms!r} ms; raise the budget to it, or allow longer gaps (more lags at "
        "calibration, a larger max_gap)",
        smallest_ms,
        proven=proven,
    )
