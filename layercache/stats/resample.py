"""The same statistics on another sigma schedule, by interpolation.

A calibration samples two functions of sigma: the velocity v(sigma), and the velocity delta
D(sigma_t, sigma_a) of reusing a residual from sigma_a at sigma_t. Sketches are linear, so both
interpolate linearly, v between two measured steps and D bilinearly in (sigma_t, sigma_a). D
vanishes on the diagonal, and across it D(t, a) = -D(a, t) to first order, so lag 0 and negative
lags need no measurement. Outside the measured sigmas the nearest two steps are extended.

The longest new lag is the one up to which every pair of new sigmas lies within the measured lags:
nothing is extrapolated towards longer gaps. At least one lag is kept; if even that reaches beyond,
D is extended in proportion to sigma_a - sigma_t.

Between two samples a linear interpolant has no curvature, and curvature is all that a predictor
gets wrong. So the finer the new schedule is against the measured one, the better predictions seem;
schedules much finer than the calibration are refused, and predicted figures of the others are
somewhat optimistic. (A cubic interpolant was no better on the reference model: of velocities
measured at every second step it missed the ones between by 25 % of a step's change, squared,
against 22 % for the linear one.)
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from layercache.errors import StatsError
from layercache.stats import CalibrationStats, FloatArray

FINEST = 0.55
"""Smallest step of a new schedule, as a share of the measured step at the same sigma."""
_SLACK = 1e-6


def resample(stats: CalibrationStats, sigmas: FloatArray) -> CalibrationStats:
    """Statistics as if they had been measured at `sigmas`.

    Args:
        stats: Measured statistics.
        sigmas: (T'+1,) noise levels, strictly falling, the last one 0.

    Raises:
        StatsError: The new sigmas are malformed, reach more than a step beyond the measured ones
            at either end, or lie much closer together.

    Example:
        >>> resample(stats, np.linspace(1, 0, 31)).num_steps  # doctest: +SKIP
        30
    """
    new = np.asarray(sigmas, dtype=np.float64)
    low, share = _located(stats, new)
    velocities = _mix(stats.velocities[:, low], stats.velocities[:, low + 1], share[:, None])
    lags = _usable_lags(low, share, stats.max_lag)
    deltas = _deltas_at(stats, low, share, lags)
    return replace(
        stats,
        sigmas=new,
        loads=stats.loads[low + (share > 0.5).astype(int)],
        segments=_renumbered(stats.segments[low + (share > 0.5).astype(int)]),
        velocities=velocities.astype(np.float32),
        latents=_latents_at(stats, new),
        deltas=deltas,
        amplification=np.exp(
            _mix(
                np.log(stats.amplification[:, low]),
                np.log(stats.amplification[:, low + 1]),
                share,
            )
        ),
    )


def _located(stats: CalibrationStats, new: FloatArray) -> tuple[NDArray[np.intp], FloatArray]:
    """`_locate` of the new steps, if they can be interpolated."""
    if new.ndim != 1 or len(new) < 2 or not np.isfinite(new).all():
        raise StatsError(f"sigmas has shape {new.shape}; it needs T+1 >= 2 finite values")
    if not (np.diff(new) < 0).all() or new[-1] != 0:
        raise StatsError("sigmas must fall strictly and end at 0")
    old = np.asarray(stats.sigmas, dtype=np.float64)
    if stats.num_steps < 2:
        raise StatsError("statistics of a single step cannot be interpolated: calibrate with more")
    if new[0] > old[0] + (old[0] - old[1]) + _SLACK:
        raise StatsError(
            f"sigmas start at {new[0]:g}, far above the calibrated {old[0]:g}: calibrate with a "
            "schedule that starts there"
        )
    low, share = _locate(old[:-1], new[:-1])
    finest = -np.diff(new)[:-1] / (old[low] - old[low + 1])[:-1]
    if len(finest) and finest.min() < FINEST:
        step = int(finest.argmin())
        raise StatsError(
            f"step {step} of the new schedule (sigma {new[step]:.4g} to {new[step + 1]:.4g}) is "
            f"{finest[step]:.2f} of the calibrated step there; below {FINEST} interpolation hides "
            "what caching would cost: calibrate with more steps"
        )
    if share[-1] > 2 + _SLACK:
        raise StatsError(
            f"the last step of the new schedule starts at sigma {new[-2]:g}, more than a step "
            f"below the last calibrated one, {old[-2]:g}: calibrate with a schedule that goes there"
        )
    return low, share


def _deltas_at(
    stats: CalibrationStats, low: NDArray[np.intp], share: FloatArray, lags: int
) -> FloatArray:
    """(P, T', G, M', S) deltas of the new steps."""
    steps = len(low)
    shape = (stats.num_prompts, steps, stats.num_groups, lags, stats.velocities.shape[2])
    deltas = np.zeros(shape, dtype=np.float32)
    for step in range(1, steps):
        for lag in range(1, min(lags, step) + 1):
            source = step - lag
            value: FloatArray = np.zeros(())
            for t, weight_t in ((low[step], 1 - share[step]), (low[step] + 1, share[step])):
                for a, weight_a in (
                    (low[source], 1 - share[source]),
                    (low[source] + 1, share[source]),
                ):
                    found, scale = _delta(stats, int(t), int(a))
                    value = value + weight_t * weight_a * scale * found
            deltas[:, step, :, lag - 1] = value
    return deltas


def _renumbered(segments: FloatArray) -> FloatArray:
    """Segments that count up from 0 by one, where the new steps may have passed some over."""
    found: FloatArray = np.cumsum(np.diff(segments, prepend=segments[:1]) != 0).astype(np.float64)
    return found


def _latents_at(stats: CalibrationStats, new: FloatArray) -> FloatArray:
    """(P, T+1, S) latents at other sigmas, along straight lines between the recorded ones."""
    old, last = stats.sigmas, len(stats.sigmas) - 2
    low = np.clip(np.searchsorted(-old, -new, side="right") - 1, 0, last)
    share = (old[low] - new) / (old[low] - old[low + 1])
    return _mix(stats.latents[:, low], stats.latents[:, low + 1], share[:, None]).astype(np.float32)


def _locate(old: FloatArray, new: FloatArray) -> tuple[NDArray[np.intp], FloatArray]:
    """For each new sigma the measured step above it and how far it lies towards the next one."""
    low = np.clip(np.searchsorted(-old, -new, side="right") - 1, 0, len(old) - 2)
    share = (old[low] - new) / (old[low] - old[low + 1])
    # A sigma that was measured keeps its own values to the last bit.
    return low, np.where(np.abs(share - np.round(share)) < _SLACK, np.round(share), share)


def _mix(first: FloatArray, second: FloatArray, share: FloatArray) -> FloatArray:
    result: FloatArray = (1 - share) * first + share * second
    return result


def _usable_lags(low: NDArray[np.intp], share: FloatArray, measured: int) -> int:
    """Longest new lag whose pairs all lie within the measured lags; at least 1."""
    steps = len(low)
    position = low + share
    lags = 0
    for lag in range(1, steps):
        reach = np.ceil(position[lag:] - _SLACK) - np.floor(position[:-lag] + _SLACK)
        if reach.max() > measured:
            break
        lags = lag
    return max(lags, 1)


def _delta(stats: CalibrationStats, step: int, source: int) -> tuple[FloatArray, float]:
    """(P, G, S) measured delta and the factor that turns it into D(step, source)."""
    lag = step - source
    if lag == 0:
        return np.zeros_like(stats.deltas[:, 0, :, 0]), 0.0
    sign = 1.0 if lag > 0 else -1.0
    step, lag = max(step, source), abs(lag)
    near = min(lag, stats.max_lag)
    old = stats.sigmas
    stretch = (old[step - lag] - old[step]) / (old[step - near] - old[step])
    return stats.deltas[:, step, :, near - 1].astype(np.float64), sign * float(stretch)
