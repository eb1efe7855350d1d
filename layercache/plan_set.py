"""`PlanSet`: several plans of one model in one file, over budgets, step counts and resolutions."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from layercache._json_file import JsonFile
from layercache.errors import BudgetError
from layercache.plan import Budget, Plan

_DIGITS = 4
"""Noise levels that agree so far are the same."""
_MOST = 256


class PlanSet(JsonFile):
    """Plans of one model; `apply_plan` picks for every run the one that is made for its schedule.

    Plans for the same noise levels and size differ in their budgets. `at` leaves one of them, and
    without it the first in the file is run.

    Example:
        >>> plans = PlanSet(plans=pareto(stats, ["1.37x", "2x"]))  # doctest: +SKIP
        >>> plans.save("layercache_plans.json")  # doctest: +SKIP
        >>> apply_plan(pipe, plans.at("2x"))  # doctest: +SKIP
    """

    VERSION: ClassVar[int] = 1
    KIND: ClassVar[str] = "plan set"
    FILE_NAME: ClassVar[str] = "layercache_plans.json"
    MAX_BYTES: ClassVar[int] = 64 * 2**20

    schema_version: Literal[1] = 1
    plans: tuple[Plan, ...] = Field(min_length=1, max_length=_MOST)

    @model_validator(mode="after")
    def _one_model(self) -> PlanSet:
        models = {plan.component: plan.model for plan in reversed(self.plans)}
        for index, plan in enumerate(self.plans):
            if plan.model != models[plan.component]:
                raise ValueError(
                    f"plans[{index}] is for another {plan.component} than the plan before: "
                    "a set is of one model"
                )
            if plan in self.plans[:index]:
                first = self.plans.index(plan)
                raise ValueError(f"plans[{index}] is plans[{first}] again: leave one of them out")
        return self

    @property
    def _plans(self) -> tuple[Plan, ...]:
        return self.plans

    def at(self, budget: Budget | float | str) -> PlanSet:
        """The set with one plan a schedule: the one that keeps the most within a budget.

        Args:
            budget: As `compile_plan` takes it, but no quality. Of plans for the same noise levels
                and size, the slowest one is kept that reaches the speedup, or stays below the
                share. Schedules without any are left out.

        Raises:
            BudgetError: No plan meets it; the message gives the nearest.
        """
        wanted = Budget.parse(budget)
        if wanted.speedup is None and wanted.fraction is None:
            raise BudgetError(f"a set is asked for a speedup or a share, not for {wanted}")
        kept: dict[tuple[Any, ...], Plan] = {}
        for plan in self.plans:
            if not _within(plan, wanted):
                continue
            best = kept.get(_schedule(plan))
            if best is None or plan.predicted.compute_share > best.predicted.compute_share:
                kept[_schedule(plan)] = plan
        if not kept:
            fastest = min(self.plans, key=lambda plan: plan.predicted.compute_share).predicted
            raise BudgetError(
                f"no plan of this set meets {wanted}: the fastest is at {fastest.speedup:.2f}x, "
                f"{fastest.compute_share:.3f} of the compute; compile one for this budget"
            )
        return PlanSet(plans=tuple(kept.values()))

    def summary(self) -> str:
        """A line a plan, for a person."""
        count = len(self.plans)
        lines = [f"{count} plan{'s' * (count > 1)} for {self.plans[0].model.class_name}"]
        for number, plan in enumerate(self.plans):
            size = plan.setting.get("latent_shape")
            quality = plan.predicted.psnr_median_db
            lines.append(
                f"  {number}: {plan.num_steps} steps"
                + (f", latents {'x'.join(map(str, size))}" if isinstance(size, list) else "")
                + f", {plan.predicted.speedup:.2f}x"
                + (f", PSNR {quality:.1f} dB foretold (median)" if quality is not None else "")
                + (f", {plan.component}" if plan.component != "transformer" else "")
            )
        return "\n".join(lines)


def _within(plan: Plan, budget: Budget) -> bool:
    # A hair's breadth, or "1.37x" would miss the plan that was compiled for 1.37x.
    if budget.speedup is not None:
        return plan.predicted.speedup >= budget.speedup * (1 - 1e-6)
    return plan.predicted.compute_share <= (budget.fraction or 0.0) * (1 + 1e-6)


def _schedule(plan: Plan) -> tuple[Any, ...]:
    levels = tuple(round(sigma, _DIGITS) for sigma in plan.sigmas)
    return plan.component, levels, str(plan.setting.get("latent_shape"))
