"""What a plan states about itself, computed again from the statistics.

A plan that is compiled is checked here before it is returned, and one whose rows are changed
afterwards gets its figures anew. All of it goes through `solver.verify`, which shares no code with
what proposed the rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from layercache.plan import Budget, Plan, Predicted, UnitPlan, version_for
from layercache.solver.gains import predicted_psnr
from layercache.solver.multistep import depth_for
from layercache.solver.resample import resample
from layercache.solver.verify import Row, Rules, VerificationError, verify
from layercache.stats import CalibrationStats

_AGREEMENT = 1e-6


def step_ms(stats: CalibrationStats) -> float:
    """Milliseconds of the transformer at one fully computed step."""
    return float(stats.group_ms.sum()) + stats.rest_ms


def budget_ms(stats: CalibrationStats, budget: Budget) -> float:
    """Milliseconds that the transformer may take for all steps."""
    full = stats.num_steps * step_ms(stats)
    if budget.speedup is None:
        return (budget.fraction or 0.0) * full
    overhead = stats.num_steps * stats.overhead_ms
    return (full + overhead) / budget.speedup - overhead


def restate(stats: CalibrationStats, plan: Plan, units: Sequence[UnitPlan]) -> Plan:
    """A plan with other rows: all its figures computed again from the statistics, and verified.

    Args:
        stats: The statistics that the plan was compiled from.
        plan: A compiled plan.
        units: Rows for the same steps and groups.

    Raises:
        VerificationError: The rows break a rule of the plan.
        StatsError: The statistics cannot be interpolated to the plan's sigmas.
    """
    if "interpolated_from_steps" in plan.provenance:
        stats = resample(stats, np.array(plan.sigmas))
    return with_rows(stats, plan, units)


def with_rows(stats: CalibrationStats, plan: Plan, units: Sequence[UnitPlan]) -> Plan:
    """As `restate`, for statistics that are at the plan's sigmas already."""
    rows = [unit.model_dump() for unit in units]
    version = {"schema_version": version_for(units)}
    changed = Plan.from_dict({**plan.to_dict(), **version, "units": rows})
    found = verify(stats, rows_of(stats, changed), rules_of(stats, changed)).require()
    psnr = predicted_psnr(stats, found.error)
    full = stats.num_steps * step_ms(stats)
    overhead = stats.num_steps * stats.overhead_ms
    objective, bound = found.objective, changed.certificate.lower_bound
    if bound > objective + _AGREEMENT * abs(objective) + found.objective_rounding:
        raise VerificationError(
            f"the rows have an objective of {objective!r}, below the plan's lower bound of "
            f"{bound!r}: the bound is of another problem than these rows"
        )
    # The same prices added up in another order may come out a rounding below a tight bound.
    bound = min(bound, objective)
    predicted = Predicted(
        speedup=(full + overhead) / (found.cost_ms + overhead),
        compute_share=found.cost_ms / full,
        psnr_db=float(psnr.mean()) if np.isfinite(psnr).all() else None,
        psnr_worst_db=float(psnr.min()) if np.isfinite(psnr).all() else None,
        cache_bytes=found.cache_bytes,
    )
    gap = max(0.0, (objective - bound) / objective) if objective > 0 else 0.0
    certificate = changed.certificate.model_copy(
        update={"objective": objective, "lower_bound": bound, "gap": gap}
    )
    return changed.model_copy(update={"predicted": predicted, "certificate": certificate})


def held_bytes(stats: CalibrationStats, plan: Plan) -> int:
    """Peak bytes that a plan of these statistics holds between steps, for one image."""
    sizes = {group.name: size for group, size in zip(stats.groups, stats.group_bytes, strict=True)}
    return plan.cache_bytes(sizes, stats.velocity_bytes, stats.output_bytes)


def rows_of(stats: CalibrationStats, plan: Plan) -> list[Row]:
    """The plan's rows as they will be read."""
    number = {group.name: index for index, group in enumerate(stats.groups)}
    return [
        Row(
            group=number.get(unit.name),
            refresh=schedule.refresh,
            anchor=schedule.anchor,
            base=schedule.base,
            weight=schedule.weight,
            taps=schedule.taps,
        )
        for unit, schedule in ((unit, plan.schedules[unit.name]) for unit in plan.units)
    ]


def rules_of(stats: CalibrationStats, plan: Plan) -> Rules:
    """What the plan says it was asked to keep to."""
    asked, mode = plan.provenance, plan.certificate.gains
    return Rules(
        budget_ms=budget_ms(stats, plan.budget),
        history=asked["history"],
        gains=mode if mode in ("none", "unit") else "cell",
        power=plan.certificate.power,
        max_gap=asked["max_gap"],
        forced=frozenset(asked["forced"]),
        max_cache_bytes=asked["max_cache_bytes"],
        depth=depth_for(asked["history"]),
    )


def check_figures(stats: CalibrationStats, plan: Plan, rules: Rules) -> None:
    """Recompute the plan as it will be read, and compare every figure on it but the bound.

    Args:
        stats: The statistics that the plan was compiled from, at the plan's sigmas.
        plan: A finished plan.
        rules: What was asked for, not what the plan says of it.

    Raises:
        VerificationError: A rule is broken or a figure is wrong.
    """
    found = verify(stats, rows_of(stats, plan), rules).require()
    full = stats.num_steps * step_ms(stats)
    overhead = stats.num_steps * stats.overhead_ms
    psnr = predicted_psnr(stats, found.error)
    with np.errstate(divide="ignore", invalid="ignore"):
        slack = 10 * np.log10(1 + found.error_rounding / found.error)
    predicted = plan.predicted
    checks: list[tuple[str, float | None, float, float]] = [
        ("speedup", predicted.speedup, (full + overhead) / (found.cost_ms + overhead), 0.0),
        ("compute_share", predicted.compute_share, found.cost_ms / full, 0.0),
        ("objective", plan.certificate.objective, found.objective, found.objective_rounding),
        ("cache_bytes", predicted.cache_bytes, found.cache_bytes, 0.0),
        ("psnr_db", predicted.psnr_db, float(psnr.mean()), float(slack.max())),
        ("psnr_worst_db", predicted.psnr_worst_db, float(psnr.min()), float(slack.max())),
    ]
    for name, stated, recomputed, rounding in checks:
        if stated is None:
            continue
        if not abs(stated - recomputed) <= _AGREEMENT * abs(stated) + rounding:
            raise VerificationError(
                f"the plan states {name} = {stated!r}, but the statistics give {recomputed!r}; "
                "this is a bug: please report it with the statistics file"
            )
