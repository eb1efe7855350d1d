"""Interpolated statistics: exact where nothing changes, exact on what is linear, refused beyond."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from layercache.errors import StatsError
from layercache.stats import CalibrationStats
from layercache.stats.resample import resample
from tests.prediction.strategies import random_stats


def linear_stats(steps: int = 20, lags: int = 6) -> CalibrationStats:
    """Velocities u + sigma w and residuals linear in sigma: interpolation has no error."""
    stats = random_stats(0, steps=steps, lags=lags)
    rng = np.random.default_rng(1)
    sigma = stats.sigmas[:-1].astype(float)
    u, w = rng.standard_normal((2, stats.num_prompts, 1, stats.velocities.shape[2]))
    slope = rng.standard_normal((stats.num_prompts, stats.num_groups, stats.velocities.shape[2]))
    deltas = np.zeros(stats.deltas.shape)
    for t in range(steps):
        for lag in range(1, min(lags, t) + 1):
            deltas[:, t, :, lag - 1] = (sigma[t - lag] - sigma[t]) * slope
    return replace(
        stats,
        velocities=(u + sigma[:, None] * w).astype(np.float32),
        deltas=deltas.astype(np.float32),
    )


def test_the_same_sigmas_give_the_same_statistics() -> None:
    stats = random_stats(1)
    again = resample(stats, stats.sigmas)
    assert again.max_lag == stats.max_lag
    assert np.array_equal(again.velocities, stats.velocities)
    assert np.array_equal(again.deltas, stats.deltas)


@pytest.mark.parametrize("steps", [8, 14, 20])
def test_linear_trajectories_are_interpolated_exactly(steps: int) -> None:
    """Oracle: the same linear functions evaluated at the new sigmas."""
    stats = linear_stats()
    old = stats.sigmas.astype(float)
    x = np.linspace(1, 1 / steps, steps)
    new = np.append(2 * x / (1 + x), 0.0)
    found = resample(stats, new)
    slope = (stats.velocities[:, 0] - stats.velocities[:, 9]) / (old[0] - old[9])
    for t in range(steps):
        expected = stats.velocities[:, 0] + (new[t] - old[0]) * slope
        assert found.velocities[:, t] == pytest.approx(expected, abs=1e-4)
        for lag in range(1, min(found.max_lag, t) + 1):
            rate = stats.deltas[:, 9, :, 0] / (old[8] - old[9])
            moved = (new[t - lag] - new[t]) * rate
            assert found.deltas[:, t, :, lag - 1] == pytest.approx(moved, abs=1e-4)


def test_fewer_steps_have_fewer_lags() -> None:
    stats = linear_stats()
    half = np.append(np.linspace(stats.sigmas[0], stats.sigmas[-2], 10), 0.0)
    assert 1 <= resample(stats, half).max_lag < stats.max_lag


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([1.0, 0.5, 0.5, 0.0], "sigmas must fall strictly and end at 0"),
        ([1.0, 0.5], "sigmas must fall strictly and end at 0"),
        ([0.0], "it needs T\\+1 >= 2 finite values"),
        ([1.5, 0.5, 0.0], "sigmas start at 1.5, far above the calibrated 1"),
        (np.linspace(1, 0, 200), "interpolation hides what caching would cost"),
    ],
)
def test_schedules_that_cannot_be_interpolated_are_refused(
    sigmas: list[float], message: str
) -> None:
    with pytest.raises(StatsError, match=message):
        resample(linear_stats(), np.array(sigmas))


def test_a_schedule_that_ends_far_below_the_measured_one_is_refused() -> None:
    """Interpolation there would carry the slope of the last two steps several steps on."""
    measured = replace(random_stats(0, steps=4), sigmas=np.array([1.0, 0.9, 0.8, 0.7, 0.0]))
    near = resample(measured, np.array([1.0, 0.9, 0.8, 0.6, 0.0]))
    assert np.isfinite(near.velocities).all()
    with pytest.raises(StatsError, match=r"starts at sigma 0\.2, more than a step below"):
        resample(measured, np.array([1.0, 0.9, 0.8, 0.2, 0.0]))
