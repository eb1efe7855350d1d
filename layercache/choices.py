"""Several plans to choose from: over shares of the compute, or of different kinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from layercache.compile import Compiler, Progress, pareto
from layercache.errors import BudgetError
from layercache.options import Options
from layercache.plan import Budget, Plan, UnitPlan
from layercache.stats import CalibrationStats


def frontier(
    stats: CalibrationStats,
    shares: Sequence[float],
    options: Options | None = None,
    *,
    progress: Progress | None = None,
) -> list[Plan]:
    """Plans at shares of the compute, without those shares that cannot be met, each plan once.

    Raises:
        BudgetError: None of them can be met; the message is that of the largest.
    """
    compiler = Compiler(stats, options, progress)
    plans: list[Plan] = []
    refused: BudgetError | None = None
    for share in sorted(set(shares), reverse=True):
        try:
            plan = compiler.plan(Budget(fraction=share))
        except BudgetError as error:
            refused = refused or error
            continue
        if not plans or plan.units != plans[-1].units:
            plans.append(plan)
    if not plans and refused is not None:
        raise refused
    return plans


def candidates(
    stats: CalibrationStats, budget: Budget | float | str, options: Options | None = None
) -> dict[str, Plan]:
    """Plans of different kinds for one budget, for a trial: `"steps"`, `"groups"` and `"both"`.

    Kinds that `options.units` leaves out, that cannot meet the budget, or that come out the same
    as another are left out.

    Raises:
        BudgetError: No kind can meet the budget.
    """
    options = options or Options()
    kinds = {"steps": ("step",), "groups": ("groups",), "both": ("step", "groups")}
    found: dict[str, Plan] = {}
    refused: BudgetError | None = None
    for kind, units in kinds.items():
        if not set(units) <= set(options.units) or ("groups" in units and not stats.num_groups):
            continue
        try:
            plan = pareto(stats, [budget], replace(options, units=units))[0]
        except BudgetError as error:
            refused = error
            continue
        if all(_moves(plan) != _moves(other) for other in found.values()):
            found[kind] = plan
    if not found:
        raise refused or BudgetError(f"no kind of plan can be made with {options}")
    return found


def _moves(plan: Plan) -> tuple[UnitPlan, ...]:
    """The rows that cache something: what tells plans apart when they run."""
    return tuple(unit for unit in plan.units if any(plan.schedules[unit.name].cached))
