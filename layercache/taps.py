"""The step unit of a compiled plan as a multistep method, fitted from the statistics."""

from __future__ import annotations

import numpy as np

from layercache.figures import held_bytes, with_rows
from layercache.plan import IDLE, REFRESH, Plan
from layercache.solver.gains import predicted_psnr
from layercache.solver.multistep import DEPTH, Multistep
from layercache.stats import CalibrationStats

MOST_LOSS_DB = 2.0
"""Multistep rows are refused if they are predicted so much worse than the plan's own gains. On the
reference model they were predicted 0.7 dB worse to 0.5 dB better, and came out 1.3 to 4.3 dB
better."""


def with_multistep(
    stats: CalibrationStats, rows: Multistep, plan: Plan, max_cache_bytes: int | None
) -> Plan:
    """The plan with multistep coefficients in place of its gains, where they apply.

    They apply to a plan with trajectory gains that skips whole steps and caches no group within a
    step: what a step costs in error is then known from the velocities alone. Where the bytes are
    limited, fewer earlier velocities are used. If not even one fits, nothing can be fitted, or the
    rows are predicted to be much worse, the plan comes back as it is and its provenance says so.

    Args:
        stats: The statistics that the plan was compiled from, at the plan's sigmas.
        rows: Fits of the same statistics.
        plan: A compiled plan.
        max_cache_bytes: Limit on stored tensors for one image.
    """
    unit = plan.step_unit
    cached = any(set(group.cells) - {REFRESH, IDLE} for group in plan.groups)
    known = plan.predicted.psnr_db
    if unit is None or plan.certificate.gains != "trajectory" or cached or known is None:
        return plan
    run = np.array(plan.run_steps)
    for depth in range(DEPTH, 0, -1):
        taps = rows.fit(run, depth).taps
        if not any(taps):
            return plan
        row = unit.model_copy(update={"gains": None, "taps": taps})
        units = tuple(row if other.kind == "step" else other for other in plan.units)
        held = held_bytes(stats, plan.model_copy(update={"units": units}))
        if max_cache_bytes is not None and held > max_cache_bytes:
            continue
        psnr = predicted_psnr(stats, rows.predicted_error(run, taps))
        if psnr.mean() < known - MOST_LOSS_DB:
            return _noted(plan, "multistep rows are predicted to be worse")
        found = with_rows(stats, as_multistep(plan), units)
        # Stated as computed here; `check_figures` holds them against the verifier's.
        figures: dict[str, float] = {"cache_bytes": held}
        if np.isfinite(psnr).all():
            figures |= {"psnr_db": float(psnr.mean()), "psnr_worst_db": float(psnr.min())}
        predicted = found.predicted.model_copy(update=figures)
        note = {"gains": f"multistep rows of up to {depth} earlier velocities"}
        return found.model_copy(
            update={"predicted": predicted, "provenance": found.provenance | note}
        )
    return _noted(plan, "max_cache_bytes leaves no room for multistep rows")


def as_multistep(plan: Plan) -> Plan:
    """The plan, its certificate naming multistep rows as what predicts."""
    certificate = plan.certificate.model_copy(update={"gains": "multistep"})
    return plan.model_copy(update={"certificate": certificate})


def taps_of(plan: Plan) -> int:
    """The most earlier outputs that a step of the plan reads; 0 without multistep rows."""
    unit = plan.step_unit
    return 0 if unit is None or unit.taps is None else max(map(len, unit.taps))


def psnr_loss(plan: Plan, other: Plan) -> float:
    """Decibels that another plan is predicted to lose; 0 where it is not known."""
    mine, theirs = plan.predicted.psnr_db, other.predicted.psnr_db
    return 0.0 if mine is None or theirs is None else mine - theirs


def _noted(plan: Plan, why: str) -> Plan:
    note = {"gains": f"{plan.provenance['gains']}; {why}"}
    return plan.model_copy(update={"provenance": plan.provenance | note})
