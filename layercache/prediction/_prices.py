"""Separable prices of all cells of all units: what solvers propose schedules on.

Shape suffixes: P prompts, T steps, M lags, L lags of the anchor, J distances of the base.

Caching step t with anchor a and base b moves the velocity by

    delta = D_a + w (D_a - D_b),    w = gamma (sigma_t - sigma_a) / (sigma_a - sigma_b),

where D_a is the velocity delta of plain reuse of a (for a group `stats.deltas` at lag t - a, for
the whole step v_a - v_t), and the step turns it into a latent error of

    price(t, a, b) = A_t^2 (sigma_{t+1} - sigma_t)^2 * mean over prompts of ||delta||^2 / numel,

with A_t (`stats.propagation`) how much longer an error made at step t is when it reaches the end.
The gain gamma is 1 for the published predictor and each cell's own least-squares optimum over the
prompts, shrunk towards 1, where taps will be fitted.

Both are quadratic forms of the Gram matrix of {D_lag}, so every anchor and span is priced from one
Gram a step, without forming a single delta. A sum of prices does not see that errors of different
steps cancel or add up: that is what `error` is for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from layercache.costs import STEP, cell_ms
from layercache.solver.problem import FloatArray, UnitCosts
from layercache.stats import CalibrationStats

STEP_LAGS = 12
"""Longest lag and span of the step unit."""
CELL_SHRINKAGE = 0.02
GAIN_RANGE = (-1.0, 4.0)


def price(
    stats: CalibrationStats, units: Sequence[str], predictor: str = "fitted"
) -> tuple[UnitCosts, ...]:
    """Price the step unit, the groups, or both (then the step unit comes first).

    Without groups a computed step costs all of the transformer's time, so that the step unit's
    `compute_ms` is then the whole call's.

    Args:
        stats: Calibration statistics.
        units: `"step"`, `"groups"`, or both.
        predictor: `"fitted"`, `"published"` or `"reuse"`.

    Example:
        >>> step, *groups = price(stats, ("step", "groups"))  # doctest: +SKIP
        >>> step.errors.shape  # doctest: +SKIP
        (50, 12, 13)
    """
    times, priced = cell_ms(stats), []
    if "step" in units:
        errors = _prices(stats, _velocity_gram(stats, 2 * STEP_LAGS), predictor)
        whole = times[:, -1] if "groups" in units else times.sum(axis=1)
        priced.append(
            UnitCosts(
                name=STEP,
                kind="step",
                compute_ms=whole,
                residual_bytes=stats.velocity_bytes,
                extra_bytes=stats.output_bytes + stats.velocity_bytes,
                errors=errors[:, :STEP_LAGS, : STEP_LAGS + 1],
            )
        )
    if "groups" in units:
        for index, group in enumerate(stats.groups):
            priced.append(
                UnitCosts(
                    name=group.name,
                    kind="group",
                    compute_ms=times[:, index],
                    residual_bytes=int(stats.group_bytes[index]),
                    errors=_prices(stats, _delta_gram(stats, index), predictor),
                )
            )
    return tuple(priced)


def uncacheable(stats: CalibrationStats) -> frozenset[int]:
    """Steps that no plan may cache, besides the first.

    Those that another expert of the pipeline makes, and the first of each segment.
    """
    first = 1 + np.flatnonzero(np.diff(stats.segments) > 0)
    elsewhere = np.flatnonzero(stats.loads.max(axis=1) <= 0)
    return frozenset(first.tolist()) | frozenset(elsewhere.tolist())


def _delta_gram(stats: CalibrationStats, group: int) -> FloatArray:
    """(P, T, M, M) inner products of one group's velocity deltas at all lags."""
    vectors = np.asarray(stats.deltas[:, :, group], dtype=np.float64)
    gram: FloatArray = vectors @ vectors.swapaxes(2, 3)
    return gram


def _velocity_gram(stats: CalibrationStats, lags: int) -> FloatArray:
    """(P, T, M, M) inner products of v_{t-lag} - v_t, lag = 1..M; 0 where t - lag < 0."""
    velocities = np.asarray(stats.velocities, dtype=np.float64)
    lags = min(lags, max(stats.num_steps - 1, 1))
    gram: FloatArray = np.zeros((stats.num_prompts, stats.num_steps, lags, lags))
    for step in range(1, stats.num_steps):
        # Differences first, products then: along straight trajectories the other order would leave
        # little but rounding.
        back = velocities[:, max(step - lags, 0) : step][:, ::-1] - velocities[:, step, None]
        count = back.shape[1]
        gram[:, step, :count, :count] = back @ back.swapaxes(1, 2)
    return gram


def _prices(stats: CalibrationStats, gram: FloatArray, predictor: str) -> FloatArray:
    """Prices (T, M, M) at [t, i, j], infinite where t - 1 - i - j < 0 or i + j >= M."""
    sigmas = np.asarray(stats.sigmas, dtype=np.float64)
    steps, lags = gram.shape[1], gram.shape[2]
    t, i, j = np.ogrid[:steps, :lags, :lags]
    anchor, base = t - 1 - i, t - 1 - i - j
    usable = (base >= 0) & (i + j < lags)
    predicts = usable & (j > 0)
    far = np.minimum(i + j, lags - 1)

    diagonal = np.einsum("ptii->pti", gram)
    aa = diagonal[:, t, i]
    ab = gram[:, t, i, far]
    bb = diagonal[:, t, far]
    slope = aa - ab
    curve = np.maximum(aa - 2 * ab + bb, 0.0)
    run = sigmas[np.maximum(anchor, 0)] - sigmas[np.maximum(base, 0)]
    rise = sigmas[t] - sigmas[np.maximum(anchor, 0)]
    reach = np.where(predicts, rise / np.where(predicts, run, 1.0), 0.0)

    if predictor == "reuse":
        usable = usable & (j == 0)
        gains = np.zeros(reach.shape)
    elif predictor == "published":
        gains = np.where(predicts, 1.0, 0.0)
    else:
        own = _cell_gains((reach * slope).sum(axis=0), (reach**2 * curve).sum(axis=0))
        gains = np.where(predicts, own, 0.0)
    weight = gains * reach
    squared = np.maximum(aa + 2 * weight * slope + weight**2 * curve, 0.0)
    moved = (np.diff(sigmas) * stats.propagation)[:, None, None] ** 2
    prices: FloatArray = np.where(usable, moved * squared.mean(axis=0) / stats.numel, np.inf)
    return prices


def _cell_gains(inner: FloatArray, norm: FloatArray) -> FloatArray:
    """Argmin over gamma of sum ||x + gamma y||^2 + s ||y||^2 (gamma - 1)^2, clipped.

    `inner` is sum <x, y> and `norm` sum ||y||^2 over prompts; s is `CELL_SHRINKAGE`. Where y
    vanishes the gain is 1.
    """
    safe = np.where(norm > 0, norm, 1.0)
    optimum = (CELL_SHRINKAGE - inner / safe) / (1.0 + CELL_SHRINKAGE)
    result: FloatArray = np.where(norm > 0, np.clip(optimum, *GAIN_RANGE), 1.0)
    return result
