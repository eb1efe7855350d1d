"""The step unit of a compiled plan as a multistep method, fitted from the statistics."""

from __future__ import annotations

import numpy as np

from layercache.figures import held_bytes, with_rows
from layercache.plan import IDLE, REFRESH, Plan
from layercache.solver.multistep import DEPTH, Multistep
from layercache.stats import CalibrationStats

MOST_LOSS_DB = 2.0
"""Multistep rows are refused if they are predicted so much worse than the plan's own gains. On the
reference model they were predicted 0.7 dB worse to 0.5 dB better, and came out 1.7 to 2.7 dB
better."""


def with_multistep(stats: CalibrationStats, plan: Plan, max_cache_bytes: int | None) -> Plan:
    """The plan with multistep coefficients in place of its gains, where they apply.

    They apply to a plan that skips whole steps and caches no group within a step: what a step costs
    in error is then known from the velocities alone. Where the bytes are limited, fewer earlier
    velocities are used. If not even one fits, or nothing can be fitted, the plan comes back as is.

    Args:
        stats: The statistics that the plan was compiled from, at the plan's sigmas.
        plan: A plan with trajectory gains.
        max_cache_bytes: Limit on stored tensors for one image.
    """
    unit = plan.step_unit
    cached = any(set(group.cells) - {REFRESH, IDLE} for group in plan.groups)
    if unit is None or plan.certificate.gains != "trajectory" or cached or all(plan.run_steps):
        return plan
    run = np.array(plan.run_steps)
    rows = Multistep(stats)
    for depth in range(DEPTH, 0, -1):
        fit = rows.fit(run, depth)
        row = unit.model_copy(update={"gains": None, "taps": fit.taps})
        units = [row if other.kind == "step" else other for other in plan.units]
        changed = plan.model_copy(
            update={
                "certificate": plan.certificate.model_copy(update={"gains": "multistep"}),
                "provenance": plan.provenance
                | {"gains": f"multistep, up to {depth} earlier velocities"},
            }
        )
        tapped = changed.model_copy(update={"units": tuple(units)})
        if max_cache_bytes is None or held_bytes(stats, tapped) <= max_cache_bytes:
            found = with_rows(stats, changed, units)
            return found if _holds(found, plan) else plan
    return plan


def _holds(found: Plan, plan: Plan) -> bool:
    before, after = plan.predicted.psnr_db, found.predicted.psnr_db
    return before is not None and after is not None and after >= before - MOST_LOSS_DB
