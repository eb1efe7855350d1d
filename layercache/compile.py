"""`compile_plan`: where statistics, solvers and plans meet.

Statistics are priced, a solver proposes schedules, gains are fitted to each, and the schedule whose
final error is predicted to be least on prompts left out of the fit becomes the plan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from layercache.errors import BudgetError, LayerCacheError
from layercache.plan import (
    IDLE,
    MAX_SPAN,
    REFRESH,
    SPANS,
    Budget,
    Certificate,
    ModelFingerprint,
    Plan,
    Predicted,
    UnitPlan,
)
from layercache.solver import SOLVERS, ScheduleProblem, ScheduleSolution
from layercache.solver.dp import DynamicProgramme
from layercache.solver.gains import GainFit, fit_gains, predicted_psnr, trajectory_error
from layercache.solver.pricing import price_units
from layercache.stats import CalibrationStats, FloatArray

HISTORY = 2


@dataclass(frozen=True)
class Options:
    """How plans are compiled; see `compile_plan`."""

    solver: str = "dp"
    units: tuple[str, ...] = ("step", "groups")
    gains: str = "trajectory"
    power: float = 1.0
    max_cache_bytes: int | None = None
    history: int = HISTORY
    max_gap: int | None = None


def compile_plan(
    stats: CalibrationStats,
    budget: Budget | float | str,
    *,
    solver: str = "dp",
    units: Sequence[str] = ("step", "groups"),
    gains: str = "trajectory",
    power: float = 1.0,
    max_cache_bytes: int | None = None,
    history: int = HISTORY,
    max_gap: int | None = None,
) -> Plan:
    """The plan that keeps the most quality within a budget. Needs no GPU and no torch.

    Args:
        stats: What calibration measured.
        budget: `Budget(speedup=1.37)`, `Budget(fraction=0.73)`, `"1.37x"` or `0.73`. A fraction is
            a share of the transformer's measured time; a speedup is that of the whole generation,
            with what each step spends outside the transformer.
        solver: `"dp"`, or `"greedy"` for the published allocator.
        units: What may be cached: whole steps (`"step"`), groups of blocks (`"groups"`), or both.
        gains: `"trajectory"` fits all predictions of a plan at once, `"cell"` each by itself,
            `"unit"` is the published predictor, `"none"` reuses without predicting.
        power: Prices of cells are raised to it; above 1 it suppresses peaks.
        max_cache_bytes: Limit on stored tensors for one image.
        history: How many refreshes before the anchor may serve as a base.
        max_gap: Most steps between a cell and its anchor.

    Raises:
        BudgetError: The budget cannot be met; the message gives the tightest one that can.
        PlanError: The budget cannot be read.
        LayerCacheError: An option is unknown.

    Example:
        >>> plan = compile_plan(stats, "2x")  # doctest: +SKIP
        >>> plan.predicted.speedup >= 2  # doctest: +SKIP
        True

    The published method (arXiv 2604.16492) is `solver="greedy", units=("groups",), gains="unit"`.
    """
    options = Options(solver, tuple(units), gains, power, max_cache_bytes, history, max_gap)
    return _compile(stats, [Budget.parse(budget)], options)[0]


def pareto(
    stats: CalibrationStats, budgets: Sequence[Budget | float | str], options: Options | None = None
) -> list[Plan]:
    """One plan a budget, the work that does not depend on the budget done once."""
    return _compile(stats, [Budget.parse(b) for b in budgets], options or Options())


def _compile(stats: CalibrationStats, budgets: list[Budget], options: Options) -> list[Plan]:
    if options.solver not in SOLVERS:
        raise LayerCacheError(
            f"solver is {options.solver!r}; use {' or '.join(map(repr, sorted(SOLVERS)))}"
        )
    limits = [_budget_ms(stats, budget) for budget in budgets]
    problem = _problem(stats, options, limits[0])
    programme = DynamicProgramme(problem) if options.solver == "dp" else None
    plans = []
    for budget, limit in zip(budgets, limits, strict=True):
        try:
            if programme is not None:
                candidates = programme.candidates(limit)
            else:
                candidates = [SOLVERS[options.solver](_problem(stats, options, limit))]
        except BudgetError as error:
            smallest = np.inf if programme is None else programme.smallest_budget_ms
            raise _infeasible(stats, budget, smallest, error) from error
        solution, fit = best_candidate(stats, candidates, options.gains)
        plans.append(_plan(stats, budget, options, solution, fit))
    return plans


def best_candidate(
    stats: CalibrationStats, candidates: Sequence[ScheduleSolution], gains: str
) -> tuple[ScheduleSolution, GainFit]:
    """The schedule whose final error, with its gains, is predicted to be least.

    Without trajectory gains the separable objective decides alone. With them it cannot: it adds
    squared errors of cells, where errors of a trajectory add as vectors and gains make them cancel.
    """
    if gains != "trajectory":
        return candidates[0], fit_gains(stats, candidates[0].units, gains)
    fits = [(solution, fit_gains(stats, solution.units, gains)) for solution in candidates]
    return min(fits, key=lambda pair: pair[1].score)


def _problem(stats: CalibrationStats, options: Options, budget_ms: float) -> ScheduleProblem:
    cell = "cell" if options.gains == "trajectory" else options.gains
    priced = price_units(stats, options.units, cell)
    return ScheduleProblem(
        sigmas=stats.sigmas,
        units=tuple(unit.costs for unit in priced),
        budget_ms=budget_ms,
        fixed_ms=0.0 if "step" in options.units else stats.num_steps * stats.rest_ms,
        history=0 if options.gains == "none" else options.history,
        max_gap=options.max_gap,
        power=options.power,
        max_cache_bytes=options.max_cache_bytes,
    )


def _step_ms(stats: CalibrationStats) -> float:
    return float(stats.group_ms.sum()) + stats.rest_ms


def _budget_ms(stats: CalibrationStats, budget: Budget) -> float:
    """Milliseconds that the transformer may take for all steps."""
    full = stats.num_steps * _step_ms(stats)
    if budget.fraction is not None:
        return budget.fraction * full
    assert budget.speedup is not None
    overhead = stats.num_steps * stats.overhead_ms
    return (full + overhead) / budget.speedup - overhead


def _infeasible(
    stats: CalibrationStats, budget: Budget, smallest_ms: float, error: BudgetError
) -> BudgetError:
    if not np.isfinite(smallest_ms):
        return BudgetError(f"a budget of {budget} cannot be met: {error}")
    full = stats.num_steps * _step_ms(stats)
    overhead = stats.num_steps * stats.overhead_ms
    share, speedup = smallest_ms / full, (full + overhead) / (smallest_ms + overhead)
    return BudgetError(
        f"a budget of {budget} cannot be met: the tightest for these statistics and options is "
        f"Budget(fraction={share:.4f}) or Budget(speedup={speedup:.3f}); relax the budget, or "
        "calibrate with more lags"
    )


def _plan(
    stats: CalibrationStats,
    budget: Budget,
    options: Options,
    solution: ScheduleSolution,
    fit: GainFit,
) -> Plan:
    rows = tuple(
        _row(stats, schedule.name, schedule.refresh, schedule.anchor, schedule.base, values, fit)
        for schedule, values in zip(solution.units, fit.gains, strict=True)
    )
    full = stats.num_steps * _step_ms(stats)
    overhead = stats.num_steps * stats.overhead_ms
    exact = all(not unit.cached.any() for unit in solution.units)
    psnr = predicted_psnr(stats, trajectory_error(stats, solution.units, fit.gains))
    plan = Plan(
        generator=f"layercache {_version()}",
        model=ModelFingerprint(**stats.model),
        setting=stats.setting,
        sigmas=tuple(float(sigma) for sigma in stats.sigmas),
        branches=stats.branches,
        units=rows,
        budget=budget,
        predicted=Predicted(
            speedup=(full + overhead) / (solution.cost_ms + overhead),
            compute_share=solution.cost_ms / full,
            psnr_db=None if exact else float(psnr.mean()),
            psnr_worst_db=None if exact else float(psnr.min()),
            cache_bytes=0,
        ),
        certificate=Certificate(
            solver=solution.solver,
            gains=fit.mode,
            power=options.power,
            objective=solution.objective,
            lower_bound=solution.lower_bound,
            gap=solution.gap,
        ),
        provenance={
            "calibration_prompts": stats.num_prompts,
            "prompts_sha256": hashlib.sha256("".join(stats.prompt_ids).encode()).hexdigest(),
            "units": list(options.units),
            "history": options.history,
            "gains": fit.note,
        },
    )
    group_bytes = {
        group.name: size for group, size in zip(stats.groups, stats.group_bytes, strict=True)
    }
    held = plan.cache_bytes(group_bytes, stats.velocity_bytes, stats.output_bytes)
    return plan.model_copy(
        update={"predicted": plan.predicted.model_copy(update={"cache_bytes": held})}
    )


def _row(
    stats: CalibrationStats,
    name: str,
    refresh: np.ndarray,
    anchor: np.ndarray,
    base: np.ndarray,
    gains: FloatArray,
    fit: GainFit,
) -> UnitPlan:
    symbols = []
    for step in range(len(refresh)):
        if refresh[step]:
            symbols.append(REFRESH)
        elif anchor[step] < 0:
            symbols.append(IDLE)
        else:
            span = int(anchor[step] - base[step]) if base[step] >= 0 else 0
            if span > MAX_SPAN:
                raise LayerCacheError(f"{name}: a span of {span} steps has no symbol in a plan")
            symbols.append(SPANS[span])
    cells = "".join(symbols)
    plain = fit.mode in ("none", "unit") or not gains.any()
    values = None if plain and fit.mode != "trajectory" else tuple(float(g) for g in gains)
    group = next((group for group in stats.groups if group.name == name), None)
    if group is None:
        return UnitPlan(kind="step", cells=cells, gains=values)
    return UnitPlan(
        kind="group",
        block_list=group.block_list,
        start=group.start,
        stop=group.stop,
        cells=cells,
        gains=values,
    )


def _version() -> str:
    try:
        return version("layercache-flow")
    except PackageNotFoundError:
        return "from source"
