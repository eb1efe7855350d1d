"""`compile_plan`: where statistics, solvers and plans meet.

Statistics are priced, a solver proposes schedules, gains are fitted to each, and the schedule whose
final error is predicted to be least on prompts left out of the fit becomes the plan. If it skips
whole steps only, multistep rows take the place of its gains. Every plan is then recomputed from the
statistics by `solver.verify`, which shares no code with the solvers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from pydantic import ValidationError

from layercache.errors import BudgetError, LayerCacheError, StatsError
from layercache.figures import budget_ms, check_figures, held_bytes, step_ms
from layercache.options import HISTORY, Options
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
from layercache.solver import SOLVERS, InfeasibleBudgetError, ScheduleProblem, ScheduleSolution
from layercache.solver.dp import DynamicProgramme
from layercache.solver.gains import GainFit, predicted_psnr, trajectory_error
from layercache.solver.multistep import Multistep, depth_for
from layercache.solver.multistep_search import MOST_LOSS_DB, MultistepSearch
from layercache.solver.polish import StepPolish
from layercache.solver.pricing import STEP_NAME, price_units
from layercache.solver.problem import BoolArray
from layercache.solver.resample import resample
from layercache.solver.select import best_candidate
from layercache.solver.solution import UnitSchedule, build_solution
from layercache.solver.verify import Rules
from layercache.stats import CalibrationStats, FloatArray
from layercache.taps import psnr_loss, taps_of, with_multistep


def compile_plan(
    stats: CalibrationStats,
    budget: Budget | float | str,
    *,
    solver: str = "dp",
    units: Sequence[str] = ("step", "groups"),
    gains: str = "multistep",
    power: float = 1.0,
    max_cache_bytes: int | None = None,
    history: int = HISTORY,
    max_gap: int | None = None,
    forced: Sequence[int] = (),
    sigmas: Sequence[float] | None = None,
) -> Plan:
    """The plan that keeps the most quality within a budget. Needs no GPU and no torch.

    Args:
        stats: What calibration measured.
        budget: `Budget(speedup=1.37)`, `Budget(fraction=0.73)`, `"1.37x"` or `0.73`. A fraction is
            a share of the transformer's measured time; a speedup is that of the whole generation,
            with what each step spends outside the transformer.
        solver: `"dp"`; `"greedy"` for the published allocator; `"milp"` for the slow reference.
        units: What may be cached: whole steps (`"step"`), groups of blocks (`"groups"`), or both.
        gains: `"multistep"` makes the steps between two computed ones one step of a fitted linear
            multistep method, where no group is cached, and is `"trajectory"` elsewhere;
            `"trajectory"` fits all predictions of a plan at once, `"cell"` each by itself, `"unit"`
            is the published predictor, `"none"` reuses without predicting.
        power: Prices of cells are raised to it; above 1 it suppresses peaks.
        max_cache_bytes: Limit on stored tensors for one image.
        history: How many refreshes before the anchor may serve as a base, 0 to 3. With 0 nothing
            is predicted; multistep coefficients reach up to four back with any other.
        max_gap: Most steps between a cell and its anchor.
        forced: Steps at which everything is computed, besides the first.
        sigmas: Compile for this schedule of T+1 noise levels (another number of steps, another
            shift) by interpolating the statistics; the plan's provenance says so.

    Raises:
        BudgetError: The budget cannot be met; the message gives the tightest one that can.
        PlanError: The budget cannot be read.
        StatsError: The statistics cannot be interpolated to `sigmas`.
        LayerCacheError: An option is unknown or not of its type, or `power` takes prices out of the
            range of floating-point numbers.

    Example:
        >>> plan = compile_plan(stats, "2x")  # doctest: +SKIP
        >>> plan.predicted.speedup >= 2  # doctest: +SKIP
        True

    The published method (arXiv 2604.16492) is `solver="greedy", units=("groups",), gains="unit"`.
    """
    options = Options(
        solver=solver,
        units=units,
        gains=gains,
        power=power,
        max_cache_bytes=max_cache_bytes,
        history=history,
        max_gap=max_gap,
        forced=forced,
        sigmas=sigmas,
    )
    return _compile(stats, [Budget.parse(budget)], options)[0]


def pareto(
    stats: CalibrationStats,
    budgets: Sequence[Budget | float | str],
    options: Options | None = None,
) -> list[Plan]:
    """One plan a budget, the work that does not depend on the budget done once.

    Raises:
        BudgetError: One of the budgets cannot be met; the message names it.
    """
    return _compile(stats, [Budget.parse(budget) for budget in budgets], options or Options())


def _compile(stats: CalibrationStats, budgets: list[Budget], options: Options) -> list[Plan]:
    if not budgets:
        return []
    if step_ms(stats) <= 0:
        raise StatsError(
            "times_ms gives the transformer 0 ms a step, of which no budget can be a share: "
            "calibrate again with a clock that sees its time"
        )
    measured_steps = stats.num_steps
    if options.sigmas is not None:
        stats = resample(stats, np.array(options.sigmas))
    problem = _problem(stats, options)
    programme = DynamicProgramme(problem) if options.solver == "dp" else None
    skips = "step" in options.units and options.history > 0
    polish = (
        StepPolish(stats, forced=problem.forced, max_gap=problem.max_gap)
        if skips and options.schedule_gains == "trajectory"
        else None
    )
    rows = Multistep(stats) if options.gains == "multistep" and skips else None
    plans = []
    for budget in budgets:
        limit = budget_ms(stats, budget)
        try:
            if programme is not None:
                count = None if options.schedule_gains == "trajectory" else 1
                candidates = programme.candidates(limit, count)
                if polish is not None:
                    candidates += _polished(problem.with_budget(limit), candidates, polish)
            else:
                candidates = [SOLVERS[options.solver](problem.with_budget(limit))]
        except InfeasibleBudgetError as error:
            raise _infeasible(stats, budget, error) from error
        try:
            plan = _best_plan(stats, budget, options, candidates, measured_steps, rows)
            if rows is not None and programme is not None and (depth := taps_of(plan)):
                search = MultistepSearch(
                    rows, depth, forced=problem.forced, max_gap=problem.max_gap
                )
                run = search.better(np.array(plan.run_steps))
                within = problem.with_budget(limit)
                others = [] if run is None else _whole_steps(within, run, candidates[0])
                if others:
                    other = _best_plan(stats, budget, options, others, measured_steps, rows)
                    keeps = taps_of(other) >= depth and psnr_loss(plan, other) <= MOST_LOSS_DB
                    plan = other if keeps else plan
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise StatsError(
                f"the statistics make no plan ({place + ': ' if place else ''}{first['msg']}): "
                "their model or groups are malformed; calibrate again"
            ) from error
        check_figures(stats, plan, _rules(options, limit))
        plans.append(plan)
    return plans


def _polished(
    problem: ScheduleProblem, candidates: Sequence[ScheduleSolution], polish: StepPolish
) -> list[ScheduleSolution]:
    """The candidate that skips the fewest steps and caches no group, improved by `StepPolish`."""
    whole = [
        candidate
        for candidate in candidates
        if all(unit.name == STEP_NAME or not unit.cached.any() for unit in candidate.units)
    ]
    if not whole:
        return []
    start = max(whole, key=lambda candidate: candidate.cost_ms)
    step = next(unit for unit in start.units if unit.name == STEP_NAME)
    return _whole_steps(problem, polish.search(step.refresh), start)


def _whole_steps(
    problem: ScheduleProblem, run: BoolArray, like: ScheduleSolution
) -> list[ScheduleSolution]:
    """The schedule that computes everything at `run`, with another's bound, if it is allowed."""
    found = build_solution(
        problem,
        [run] * len(problem.units),
        [problem.history] * len(problem.units),
        solver=like.solver,
        lower_bound=like.lower_bound,
    )
    limit = problem.max_cache_bytes
    fits = limit is None or found.cache_bytes <= limit
    return [found] if fits and np.isfinite(found.objective) else []


def _best_plan(
    stats: CalibrationStats,
    budget: Budget,
    options: Options,
    candidates: Sequence[ScheduleSolution],
    measured_steps: int,
    rows: Multistep | None,
) -> Plan:
    limit = options.max_cache_bytes
    solution, fit = best_candidate(stats, candidates, options.schedule_gains)
    plan = _plan(stats, budget, options, solution, fit, measured_steps)
    if limit is not None and plan.predicted.cache_bytes > limit:
        # Corrections keep one more output alive, which the solver did not count.
        solution, fit = best_candidate(stats, candidates, options.schedule_gains, corrections=False)
        plan = _plan(stats, budget, options, solution, fit, measured_steps)
    return plan if rows is None else with_multistep(stats, rows, plan, limit)


def _problem(stats: CalibrationStats, options: Options) -> ScheduleProblem:
    priced = price_units(stats, options.units, _cell_gains(options))
    return ScheduleProblem(
        sigmas=stats.sigmas,
        units=tuple(unit.costs for unit in priced),
        budget_ms=0.0,
        fixed_ms=0.0 if "step" in options.units else stats.num_steps * stats.rest_ms,
        history=_history(options),
        max_gap=options.max_gap,
        forced=frozenset(options.forced),
        power=options.power,
        max_cache_bytes=options.max_cache_bytes,
    )


def _rules(options: Options, limit_ms: float) -> Rules:
    return Rules(
        budget_ms=limit_ms,
        history=_history(options),
        gains=_cell_gains(options),
        power=options.power,
        max_gap=options.max_gap,
        forced=frozenset(options.forced),
        max_cache_bytes=options.max_cache_bytes,
        depth=depth_for(_history(options)),
    )


def _cell_gains(options: Options) -> str:
    """The gains that cells are priced with, before any trajectory is known."""
    return "cell" if options.schedule_gains == "trajectory" else options.gains


def _history(options: Options) -> int:
    return 0 if options.gains == "none" else options.history


def _infeasible(
    stats: CalibrationStats, budget: Budget, error: InfeasibleBudgetError
) -> BudgetError:
    if not np.isfinite(error.smallest_ms):
        return BudgetError(f"a budget of {budget} cannot be met: {error}")
    full = stats.num_steps * step_ms(stats)
    overhead = stats.num_steps * stats.overhead_ms
    # Rounded to the side on which the budget is met; full compute may come out a bit above `full`.
    share = min(math.ceil(error.smallest_ms / full * 1e4) / 1e4, 1.0)
    speedup = math.floor((full + overhead) / (error.smallest_ms + overhead) * 1e3) / 1e3
    speedup = max(speedup, 1.0)
    found = "" if error.proven else "found "
    return BudgetError(
        f"a budget of {budget} cannot be met: the tightest {found}for these statistics and options "
        f"is Budget(fraction={share:.4f}) or Budget(speedup={speedup:.3f}); relax the budget, "
        "calibrate with more lags, or raise max_gap and max_cache_bytes where they are set"
    )


def _plan(
    stats: CalibrationStats,
    budget: Budget,
    options: Options,
    solution: ScheduleSolution,
    fit: GainFit,
    measured_steps: int,
) -> Plan:
    rows = tuple(
        _unit_plan(stats, schedule, gains, fit.mode)
        for schedule, gains in zip(solution.units, fit.gains, strict=True)
    )
    full = stats.num_steps * step_ms(stats)
    overhead = stats.num_steps * stats.overhead_ms
    exact = all(not unit.cached.any() for unit in solution.units)
    psnr = predicted_psnr(stats, trajectory_error(stats, solution.units, fit.gains))
    known = not exact and bool(np.isfinite(psnr).all())
    provenance = {
        "calibration_prompts": stats.num_prompts,
        "calibration_mode": stats.mode,
        "prompts_sha256": stats.prompts_sha256,
        "seed": stats.sketch_seed,
        "units": list(options.units),
        "history": _history(options),
        "max_gap": options.max_gap,
        "forced": list(options.forced),
        "max_cache_bytes": options.max_cache_bytes,
        "status": solution.status,
        "gains": fit.note,
    }
    setting = stats.setting
    if options.sigmas is not None:
        provenance["interpolated_from_steps"] = measured_steps
        # The sigmas stand in the plan; what the calibration called for would contradict them.
        setting = {
            key: value
            for key, value in setting.items()
            if key != "num_inference_steps" and "shift" not in key
        }
    plan = Plan(
        generator=f"layercache {_version()}",
        model=ModelFingerprint.model_validate(stats.model),
        setting=setting,
        sigmas=tuple(float(sigma) for sigma in stats.sigmas),
        branches=stats.branches,
        units=rows,
        budget=budget,
        predicted=Predicted(
            speedup=(full + overhead) / (solution.cost_ms + overhead),
            compute_share=solution.cost_ms / full,
            psnr_db=float(psnr.mean()) if known else None,
            psnr_worst_db=float(psnr.min()) if known else None,
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
        provenance=provenance,
    )
    held = held_bytes(stats, plan)
    return plan.model_copy(
        update={"predicted": plan.predicted.model_copy(update={"cache_bytes": held})}
    )


def _unit_plan(
    stats: CalibrationStats, schedule: UnitSchedule, gains: FloatArray, mode: str
) -> UnitPlan:
    symbols = []
    for step, (anchor, base) in enumerate(zip(schedule.anchor, schedule.base, strict=True)):
        if schedule.refresh[step]:
            symbols.append(REFRESH)
        elif anchor < 0:
            symbols.append(IDLE)
        else:
            span = int(anchor - base) if base >= 0 else 0
            if span > MAX_SPAN:
                raise LayerCacheError(
                    f"{schedule.name}: a span of {span} steps has no symbol in a plan"
                )
            symbols.append(SPANS[span])
    values = None if mode in ("none", "unit") else tuple(float(gain) for gain in gains)
    cells = "".join(symbols)
    group = next((group for group in stats.groups if group.name == schedule.name), None)
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
