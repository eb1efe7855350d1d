"""Prices of all cells of all units, from calibration statistics.

Shape suffixes: P prompts, T steps, M lags, L lags of the anchor, J distances of the base.

Caching step t with anchor a and base b moves the velocity by

    delta = D_a + w (D_a - D_b),    w = gamma (sigma_t - sigma_a) / (sigma_a - sigma_b),

where D_a is the measured velocity delta of plain reuse of a (for a group `stats.deltas` at lag t -
a, for the whole step v_a - v_t), and the Euler step turns it into a latent error of

    price(t, a, b) = A_t^2 (sigma_{t+1} - sigma_t)^2 * mean over prompts of ||delta||^2 / numel,

with A_t (`stats.propagation`) how much longer an error made at step t is when it reaches the end.

Both are quadratic forms of the Gram matrix of {D_lag}, so every anchor, span and gain is priced
from one Gram a step, without forming a single delta. The gain of a cell is 0 (`"none"`), 1
(`"unit"`, the published predictor), or its own least-squares optimum over the prompts (`"cell"`),
shrunk towards 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from layercache.errors import LayerCacheError
from layercache.solver.problem import FloatArray, UnitCosts
from layercache.stats import CalibrationStats

STEP_NAME = "step"
STEP_LAGS = 12
STEP_SPANS = 12
CELL_SHRINKAGE = 0.02
GAIN_RANGE = (-1.0, 4.0)
_MAX_SPAN = 35


@dataclass(frozen=True, eq=False)
class PricedUnit:
    """A unit's costs, and the gain (T, L, J+1) that each of its prices stands for."""

    costs: UnitCosts
    gains: FloatArray


def price_units(
    stats: CalibrationStats,
    units: Sequence[str] = ("step", "groups"),
    gains: str = "cell",
    *,
    step_lags: int = STEP_LAGS,
    step_spans: int = STEP_SPANS,
) -> tuple[PricedUnit, ...]:
    """Price the step unit, the groups, or both (then the step unit comes first).

    Without groups a computed step costs all of the transformer's time, so that the step unit's
    `refresh_ms` is then the whole call's.

    Args:
        stats: Calibration statistics.
        units: `"step"`, `"groups"`, or both.
        gains: How a predicted cell's gain is chosen.
        step_lags: Longest lag of the step unit's anchor.
        step_spans: Longest distance between its anchor and base.

    Raises:
        LayerCacheError: `units` or `gains` is unknown.

    Example:
        >>> step, *groups = price_units(stats)  # doctest: +SKIP
        >>> step.costs.errors.shape  # doctest: +SKIP
        (50, 12, 13)
    """
    unknown = sorted(set(units) - {"step", "groups"})
    if unknown or not units:
        raise LayerCacheError(f"units is {tuple(units)!r}; use 'step', 'groups' or both")
    if gains not in ("none", "unit", "cell"):
        raise LayerCacheError(f"gains is {gains!r}; cells have 'none', 'unit' or 'cell'")
    priced = []
    if "step" in units:
        errors, table = _price(stats, _velocity_gram(stats, step_lags + step_spans), gains)
        whole = stats.rest_ms + (0.0 if "groups" in units else float(stats.group_ms.sum()))
        costs = UnitCosts(
            name=STEP_NAME,
            kind="step",
            refresh_ms=whole,
            residual_bytes=stats.velocity_bytes,
            extra_bytes=stats.output_bytes,
            errors=errors[:, :step_lags, : step_spans + 1],
        )
        priced.append(PricedUnit(costs, table[:, :step_lags, : step_spans + 1]))
    if "groups" in units:
        for index, group in enumerate(stats.groups):
            errors, table = _price(stats, _delta_gram(stats, index), gains)
            costs = UnitCosts(
                name=group.name,
                kind="group",
                refresh_ms=float(stats.group_ms[index]),
                residual_bytes=int(stats.group_bytes[index]),
                errors=errors[:, :, : _MAX_SPAN + 1],
            )
            priced.append(PricedUnit(costs, table[:, :, : _MAX_SPAN + 1]))
    return tuple(priced)


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


def _price(stats: CalibrationStats, gram: FloatArray, mode: str) -> tuple[FloatArray, FloatArray]:
    """Prices and gains (T, M, M) at [t, i, j], infinite where t - 1 - i - j < 0 or i + j >= M."""
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

    if mode == "none":
        gains = np.zeros(reach.shape)
        usable = usable & (j == 0)
    elif mode == "unit":
        gains = np.where(predicts, 1.0, 0.0)
    else:
        gains = np.where(
            predicts,
            cell_gains((reach * slope).sum(axis=0), (reach**2 * curve).sum(axis=0)),
            0.0,
        )
    weight = gains * reach
    squared = np.maximum(aa + 2 * weight * slope + weight**2 * curve, 0.0)
    euler = (np.diff(sigmas) * stats.propagation)[:, None, None] ** 2
    prices = np.where(usable, euler * squared.mean(axis=0) / stats.numel, np.inf)
    return prices, gains


def cell_gains(inner: FloatArray, norm: FloatArray) -> FloatArray:
    """Argmin over gamma of sum ||x + gamma y||^2 + s ||y||^2 (gamma - 1)^2, clipped.

    `inner` is sum <x, y> and `norm` sum ||y||^2 over prompts; s is `CELL_SHRINKAGE`. Where y
    vanishes the gain is 1.
    """
    safe = np.where(norm > 0, norm, 1.0)
    optimum = (CELL_SHRINKAGE - inner / safe) / (1.0 + CELL_SHRINKAGE)
    result: FloatArray = np.where(norm > 0, np.clip(optimum, *GAIN_RANGE), 1.0)
    return result
