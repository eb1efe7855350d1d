"""`ScheduleProblem`: what every solver reads.

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

*Branches*: a unit serves all transformer calls of a step, or the one `branch` that it names. Each
branch may have a step unit of its own, which then skips that branch alone; groups follow the step
unit of their branch (`ScheduleProblem.families`). All of them share the budget and the bytes.

*Reserved bytes*: a unit that never predicts beyond depth d (its bases are among the d refreshes
before the anchor; d = 0 is reuse alone) keeps a ring of 1 + d residuals, and none if it is never
cached. Reserved bytes are the sum of all rings. A runtime that frees a residual after its last use
holds at most that; unlike the true peak over time, it does not couple the units, which is what
makes the problem solvable exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral, Real
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


def whole(name: str, value: Any) -> int:
    """`value` as a Python int: numpy integers and floats without a fraction are fine.

    Raises:
        ProblemError: It is not a whole number.

    Example:
        >>> whole("max_cache_bytes", 1e9)
        1000000000
    """
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real) and float(value).is_integer():
        return int(float(value))
    raise ProblemError(f"{name} is {value!r}; it must be a whole number")


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
        branch: The branch whose calls the unit serves; empty if it serves all of them.
    """

    name: str
    kind: Literal["group", "step"]
    refresh_ms: float
    residual_bytes: int
    errors: FloatArray
    extra_bytes: int = 0
    branch: str = ""

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


@dataclass(frozen=True)
class Family:
    """Units that share the steps they run: positions in `ScheduleProblem.units`.

    Attributes:
        step: The step unit whose skipped steps the groups sit out, or None: all steps are run.
        groups: The units that it governs.
    """

    step: int | None
    groups: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class ScheduleProblem:
    """Steps x units x spans under a budget; validated once, so that solvers need not check.

    Args:
        sigmas: (T+1,) strictly falling noise levels.
        units: The units; at most one step unit, or one for each of several branches.
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
        forced = frozenset(whole("a forced step", step) for step in self.forced)
        object.__setattr__(self, "forced", forced)
        for name in ("history", "max_gap", "max_cache_bytes"):
            if (value := getattr(self, name)) is not None or name == "history":
                object.__setattr__(self, name, whole(name, value))
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
        served = [unit.branch for unit in self.units if unit.kind == "step"]
        if len(set(served)) < len(served) or ("" in served and len(served) > 1):
            raise ProblemError(
                f"step units serve the branches {served}; there may be one for all branches (''), "
                "or one for each"
            )
        shared = [u.name for u in self.units if u.kind == "group" and not u.branch]
        if any(served) and shared:
            raise ProblemError(
                f"step units serve the branches {served}, and group {shared[0]!r} all of them: "
                "give every group the branch that it serves"
            )
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
        if not 0 < self.power < np.inf:
            raise ProblemError(f"power is {self.power}; it must be finite and above 0")
        if self.max_cache_bytes is not None and self.max_cache_bytes < 0:
            raise ProblemError(f"max_cache_bytes is {self.max_cache_bytes}; it must be at least 0")

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.sigmas) - 1

    @property
    def step_unit(self) -> UnitCosts | None:
        """The unit of the whole step, if there is one; the first of several."""
        return next((unit for unit in self.units if unit.kind == "step"), None)

    @property
    def groups(self) -> tuple[UnitCosts, ...]:
        """The units of block groups, in order."""
        return tuple(unit for unit in self.units if unit.kind == "group")

    @cached_property
    def families(self) -> tuple[Family, ...]:
        """Every unit once, by the step unit that governs it.

        A step unit without groups governs nothing: where there are several, it is a unit like any
        other, in the family of those that run at all steps.
        """
        steps = {u.branch: i for i, u in enumerate(self.units) if u.kind == "step"}
        governed: dict[int, list[int]] = {step: [] for step in steps.values()}
        free: list[int] = []
        for index, unit in enumerate(self.units):
            if unit.kind == "group":
                governed.get(steps.get(unit.branch, steps.get("", -1)), free).append(index)
        if len(governed) > 1:
            free += [step for step, groups in governed.items() if not groups]
            governed = {step: groups for step, groups in governed.items() if groups}
        found = [Family(step, tuple(groups)) for step, groups in governed.items()]
        if free:
            found.append(Family(None, tuple(sorted(free))))
        return tuple(found)

    @property
    def budget_limit(self) -> float:
        """`budget_ms` with the tolerance on it."""
        return self.budget_ms + BUDGET_RTOL * abs(self.budget_ms)

    @cached_property
    def prices(self) -> tuple[FloatArray, ...]:
        """One (T, L, J+1) table a unit, with power, `max_gap` and forced steps worked in.

        Raises:
            ProblemError: The power takes a price out of the range of floating-point numbers.
        """
        tables = []
        for unit in self.units:
            with np.errstate(over="ignore"):
                table = unit.errors**self.power
            lost = (unit.errors > 0) & (table < np.finfo(np.float64).tiny)
            lost |= np.isfinite(unit.errors) & np.isinf(table)
            if lost.any():
                raise ProblemError(
                    f"power is {self.power}, and {unit.name}'s price of {unit.errors[lost][0]:g} "
                    "raised to it is no floating-point number: bring the power nearer to 1"
                )
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
