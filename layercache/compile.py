"""`compile_plan`: from statistics to a plan, straight through.

    price(stats)  ->  propose (solver)  ->  fit taps and score  ->  search  ->  Plan.of  ->  verify

Prices are separable, and solvers propose schedules on them (`prediction.prices`, `solver`). The
error model fits taps and scores schedules (`prediction.error`); the search makes that score small
(`prediction.search`). The plan states what the error model foretells, and `verify` computes every
figure of it again from the statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Unpack

import numpy as np
from pydantic import ValidationError

from layercache._fit_rows import rows_of
from layercache.costs import STEP, cache_bytes, cell_ms, full_ms, speedup_of
from layercache.errors import BudgetError, OptionError, StatsError
from layercache.options import Changes, Options
from layercache.plan import Budget, Certificate, Plan
from layercache.prediction import (
    DEPTH,
    STEP_LAGS,
    ErrorModel,
    Fit,
    Propose,
    Search,
    Table,
    predicted_psnr,
    price,
    uncacheable,
)
from layercache.solver import SOLVERS, InfeasibleBudgetError, ScheduleProblem, ScheduleSolution
from layercache.solver.dp import DynamicProgramme
from layercache.solver.problem import BoolArray
from layercache.stats import CalibrationStats
from layercache.stats.resample import resample
from layercache.verify import verify

Progress = Callable[[int, int], None]
NEAR = 1.0
"""Schedules of lower levels whose quick scores are so close (10 dB) are fitted in full too, and
what is foretold best is taken: a larger budget is then never foretold worse."""


def compile_plan(
    stats: CalibrationStats,
    budget: Budget | float | str,
    options: Options | None = None,
    *,
    progress: Progress | None = None,
    **changes: Unpack[Changes],
) -> Plan:
    """The plan that keeps the most quality within a budget. Needs no GPU and no torch.

    Args:
        stats: What calibration measured.
        budget: `Budget(speedup=1.37)`, `Budget(fraction=0.73)`, `Budget(psnr_db=40)`, or a short
            form: `"1.37x"`, `0.73`, `"40dB"`, `"40dB@10%"`. A fraction is a share of the
            transformer's measured time; a speedup that of the whole generation, with what each step
            spends outside the transformer; a quality that of the fastest plan foretold to keep it.
        options: How it is compiled.
        progress: Called with how many of how many levels are searched.
        changes: Fields of `options`, by name: `solver="dp"`, `units="step"`, `max_gap=4`.

    Raises:
        BudgetError: The budget cannot be met; the message gives the tightest one that can.
        PlanError: The budget cannot be read.
        StatsError: The statistics cannot be interpolated to `sigmas`.
        OptionError: An option is unknown or not of its type, or the units are groups alone and the
            statistics have none.

    Example:
        >>> plan = compile_plan(stats, "2x")  # doctest: +SKIP
        >>> plan.predicted.speedup >= 2  # doctest: +SKIP
        True

    The published method (arXiv 2604.16492) is `solver="greedy", units=("groups",),
    predictor="published"`.
    """
    options = replace(options or Options(), **changes)
    return pareto(stats, [budget], options, progress=progress)[0]


def pareto(
    stats: CalibrationStats,
    budgets: Sequence[Budget | float | str],
    options: Options | None = None,
    *,
    progress: Progress | None = None,
) -> list[Plan]:
    """One plan a budget, the work that does not depend on the budget done once.

    Raises:
        BudgetError: One of the budgets cannot be met; the message names it.
    """
    compiler = Compiler(stats, options, progress)
    return [compiler.plan(Budget.parse(budget)) for budget in budgets]


@dataclass(frozen=True, eq=False)
class _Choice:
    """A fitted schedule with what is known of it."""

    fit: Fit
    certificate: Certificate


class Compiler:
    """Statistics, options, and what all budgets share."""

    def __init__(
        self,
        stats: CalibrationStats,
        options: Options | None = None,
        progress: Progress | None = None,
    ) -> None:
        options = options or Options()
        self.progress = progress or (lambda level, levels: None)
        if full_ms(stats) <= 0:
            raise StatsError(
                "times_ms gives the transformer 0 ms a step, of which no budget can be a share: "
                "calibrate again with a clock that sees its time"
            )
        self.measured = stats
        if options.sigmas is not None:
            stats = resample(stats, np.array(options.sigmas))
        options.check_steps(stats.num_steps)
        if not stats.groups and "step" not in options.units:
            raise OptionError(
                f"units is {tuple(options.units)}, and the statistics have no groups: add "
                "'step', or calibrate a model that has an adapter with groups="
            )
        self.stats, self.options = stats, options
        self.forced = uncacheable(stats) | frozenset(options.forced)
        self._models: dict[int, ErrorModel] = {}
        self._fitted: dict[tuple[int, bytes], Fit] = {}

    def plan(self, budget: Budget) -> Plan:
        """The plan for one budget, verified."""
        try:
            quality = budget.psnr_db is not None
            choice = self._keeping(budget) if quality else self._within(budget.limit_ms(self.stats))
        except InfeasibleBudgetError as error:
            raise self._infeasible(budget, error) from error
        try:
            plan = self._plan(budget, choice)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise StatsError(
                f"the statistics make no plan ({place + ': ' if place else ''}{first['msg']}): "
                "their model or groups are malformed; calibrate again"
            ) from error
        verify(self.measured, plan)
        return plan

    def _within(self, limit_ms: float) -> _Choice:
        """What is foretold best within a budget."""
        return (
            self._searched(limit_ms) if self.options.solver == "search" else self._solved(limit_ms)
        )

    def _keeping(self, budget: Budget) -> _Choice:
        """What keeps a quality at the smallest budget at which anything does.

        The search makes its levels from the smallest on, so none above the one that is found is
        searched. They are not halved, since a quantile, unlike the score, may fall from one to the
        next. At the last one everything is computed, and nothing is lost.
        """
        full, steps = full_ms(self.stats), self.stats.num_steps
        levels = [full * count / steps for count in range(1, steps + 1)]
        if self.options.solver == "search" and self._searches:
            levels = max((search.budgets_ms for _, search in self._searches), key=len)
        for limit_ms in levels[:-1]:
            try:
                choice = self._within(limit_ms)
            except InfeasibleBudgetError:
                continue
            if budget.kept_by(predicted_psnr(self.stats, choice.fit.error)):
                return choice
        return self._within(full)

    # -- solvers ------------------------------------------------------------------------------

    @cached_property
    def _programme(self) -> DynamicProgramme:
        return DynamicProgramme(self._problem(tuple(self.options.units)))

    def _problem(self, units: Sequence[str]) -> ScheduleProblem:
        stats, options = self.stats, self.options
        rest = float(cell_ms(stats)[:, -1].sum())
        return ScheduleProblem(
            units=price(stats, units, options.predictor),
            budget_ms=0.0,
            fixed_ms=0.0 if "step" in units else rest,
            history=0 if options.predictor == "reuse" else 1,
            max_gap=options.max_gap,
            forced=self.forced,
            max_cache_bytes=options.max_cache_bytes,
        )

    def _solved(self, limit_ms: float) -> _Choice:
        """The schedule of one solver, with as many taps as the bytes allow."""
        if self.options.solver == "dp":
            solution = self._programme.solve(limit_ms)
        else:
            solution = SOLVERS[self.options.solver](self._programme.problem.with_budget(limit_ms))
        certificate = Certificate(
            solver=solution.solver,
            value=solution.objective,
            lower_bound=solution.lower_bound,
        )
        computed = self._computed(solution)
        fits = (self._fit(depth, computed) for depth in range(DEPTH, -1, -1))
        fit = next((fit for fit in fits if self._fits(fit)), None) or self._fit(0, computed)
        return _Choice(fit, certificate)

    def _computed(self, solution: ScheduleSolution) -> BoolArray:
        """(T, 1+G) of a solution, which has columns for its units alone."""
        columns = dict(zip(solution.names, solution.computed.T, strict=True))
        run = columns.get(STEP, np.ones(self.stats.num_steps, dtype=bool))
        rows = [run] + [columns.get(group.name, run) for group in self.stats.groups]
        return np.array(rows).T

    def _model(self, depth: int) -> ErrorModel:
        if depth not in self._models:
            self._models[depth] = ErrorModel(self.stats, self.options.predictor, depth)
        return self._models[depth]

    # -- the search ---------------------------------------------------------------------------

    def _searched(self, limit_ms: float) -> _Choice:
        """The best schedule of all searches, in full fits."""
        best: _Choice | None = None
        for depth, search in self._searches:
            for found in search.near(limit_ms, NEAR):
                fit = self._fit(depth, found.computed)
                if not np.isfinite(fit.score):
                    certificate = Certificate(solver="search", value=0.0, lower_bound=0.0)
                else:
                    certificate = Certificate(
                        solver="search", objective="score", value=fit.score, starts=found.starts
                    )
                if best is None or fit.score < best.fit.score:
                    best = _Choice(fit, certificate)
        # Between what the programme can meet and the first level there is nothing to search.
        return best or self._solved_tightly(limit_ms)

    def _solved_tightly(self, limit_ms: float) -> _Choice:
        computed = self._computed(self._programme.solve(limit_ms))
        fit = self._fit(0 if self.options.max_cache_bytes is not None else DEPTH, computed)
        certificate = Certificate(solver="search", objective="score", value=fit.score, starts=1)
        return _Choice(fit, certificate)

    @cached_property
    def _searches(self) -> list[tuple[int, Search]]:
        """A search of whole steps, and one with groups that starts from what it finds."""
        depths = (DEPTH,) if self.options.max_cache_bytes is None else range(DEPTH, -1, -1)
        found = []
        for depth in depths:
            table = self._table(depth)
            alone = replace(table, skips=True, groups=(), step_reach=self._reach(STEP_LAGS))
            model = self._quick(depth, groups=False)
            programme = DynamicProgramme(self._problem(("step",)))
            steps = Search(model, alone, self._propose(programme), self.progress)
            if table.skips:
                found.append((depth, steps))
            if table.groups:
                model = self._quick(depth, groups=True)
                propose = self._propose(self._programme, steps, at_once=not table.skips)
                found.append((depth, Search(model, table, propose, self.progress)))
        return found

    def _quick(self, depth: int, groups: bool) -> ErrorModel:
        return ErrorModel(self.stats, self.options.predictor, depth, quick=True, groups=groups)

    def _propose(
        self, programme: DynamicProgramme, steps: Search | None = None, *, at_once: bool = False
    ) -> Propose:
        """What the dynamic programme, the published allocator and a search of steps find.

        With `at_once`, no step can be skipped: all groups are cached there instead.
        """
        rest, full = float(cell_ms(self.stats)[:, -1].sum()), full_ms(self.stats)

        def propose(budget_ms: float) -> list[BoolArray]:
            found = []
            if steps is not None:
                # Of a step whose groups are all cached, the rest is spent all the same.
                room = budget_ms - rest * (full - budget_ms) / (full - rest or 1.0) * at_once
                best = steps.best(room)
                if best is not None:
                    schedule = best.computed.copy()
                    schedule[:, 0] |= at_once
                    found.append(schedule)
            problem = programme.problem.with_budget(budget_ms)
            for solve in (programme.solve, lambda _: SOLVERS["greedy"](problem)):
                try:
                    found.append(self._computed(solve(budget_ms)))
                except InfeasibleBudgetError:
                    continue
            return found

        return propose

    def _reach(self, most: int) -> int:
        """Most steps between a cached cell and its anchor."""
        return most if self.options.max_gap is None else min(most, self.options.max_gap)

    def _table(self, depth: int) -> Table:
        """The schedules that options and bytes allow at a depth."""
        stats, options = self.stats, self.options
        times = cell_ms(stats)
        fixed: BoolArray = np.zeros(stats.num_steps, dtype=bool)
        fixed[[0, *sorted(self.forced)]] = True
        room = math.inf if options.max_cache_bytes is None else float(options.max_cache_bytes)
        outputs = stats.velocity_bytes * (1 + (depth + 1 if depth else 0))
        skips = "step" in options.units and outputs + stats.output_bytes <= room
        room -= outputs + stats.output_bytes if skips else outputs if depth else 0
        groups = []
        if "groups" in options.units:
            for index in np.argsort(stats.group_bytes, kind="stable").tolist():
                size = stats.group_bytes[index] * (1 + depth)
                if size <= room:
                    groups.append(index)
                    room -= size
        return Table(
            cost=np.column_stack([times[:, -1], times[:, :-1]]),
            fixed=fixed,
            skips=skips,
            groups=tuple(sorted(groups)),
            step_reach=self._reach(STEP_LAGS),
            group_reach=self._reach(stats.max_lag),
        )

    # -- the plan -----------------------------------------------------------------------------

    def _fit(self, depth: int, computed: BoolArray) -> Fit:
        key = depth, computed.tobytes()
        if key not in self._fitted:
            self._fitted[key] = self._model(depth).fit(computed)
        return self._fitted[key]

    def _fits(self, fit: Fit) -> bool:
        limit = self.options.max_cache_bytes
        if limit is None:
            return True
        rows = rows_of(self.stats, self.options, fit)
        schedules = {row.name: row.schedule(self.stats.sigmas.tolist()) for row in rows}
        return cache_bytes(self.stats, schedules) <= limit

    def _plan(self, budget: Budget, choice: _Choice) -> Plan:
        stats = self.stats
        psnr = predicted_psnr(stats, choice.fit.error)
        provenance = {
            "calibration_prompts": stats.num_prompts,
            "calibration_mode": stats.mode,
            "prompts_sha256": stats.prompts_sha256,
            "sketch_seed": stats.sketch_seed,
        }
        if self.options.sigmas is not None:
            provenance["interpolated_from_steps"] = self.measured.num_steps
        return Plan.of(
            stats,
            budget,
            self.options,
            rows_of(stats, self.options, choice.fit),
            psnr=psnr if np.isfinite(psnr).all() else None,
            certificate=choice.certificate,
            provenance=provenance,
        )

    def _infeasible(self, budget: Budget, error: InfeasibleBudgetError) -> BudgetError:
        if not np.isfinite(error.smallest_ms):
            return BudgetError(f"a budget of {budget} cannot be met: {error}")
        # Rounded to the side on which the budget is met; all of it may come out a bit above 1.
        share = min(math.ceil(error.smallest_ms / full_ms(self.stats) * 1e4) / 1e4, 1.0)
        speedup = math.floor(speedup_of(self.stats, error.smallest_ms) * 1e3) / 1e3
        found = "" if error.proven else "found "
        return BudgetError(
            f"a budget of {budget} cannot be met: the tightest {found}for these statistics and "
            f"options is Budget(fraction={share:.4f}) or Budget(speedup={max(speedup, 1.0):.3f}); "
            "relax the budget, calibrate with more lags, or raise max_gap and max_cache_bytes "
            "where they are set"
        )
