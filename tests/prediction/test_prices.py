"""Prices against deltas formed as vectors, one cell at a time (the oracle is `price` below)."""

from __future__ import annotations

import numpy as np
import pytest

from layercache.prediction._prices import GAIN_RANGE, _cell_gains, uncacheable
from layercache.prediction._prices import price as priced
from layercache.stats import CalibrationStats
from tests.prediction.strategies import random_stats


def price(stats: CalibrationStats, unit: int | None, t: int, i: int, j: int, gain: float) -> float:
    sigma = stats.sigmas.astype(float)
    a, b = t - 1 - i, t - 1 - i - j

    def delta(s: int) -> np.ndarray:
        if unit is None:
            return stats.velocities[:, s].astype(float) - stats.velocities[:, t].astype(float)
        return stats.deltas[:, t, unit, t - s - 1].astype(float)

    vector = delta(a)
    if j:
        rise = (sigma[t] - sigma[a]) / (sigma[a] - sigma[b])
        vector = vector + gain * rise * (delta(a) - delta(b))
    dt = (sigma[t + 1] - sigma[t]) * stats.propagation[t]
    return float(dt**2 * (vector**2).sum(axis=1).mean() / stats.numel)


def gain_of(stats: CalibrationStats, unit: int | None, t: int, i: int, j: int) -> float:
    """A cell's own gain: least squares over the prompts, pulled towards 1."""
    if j == 0:
        return 0.0
    gains = np.linspace(*GAIN_RANGE, 5)
    values = [price(stats, unit, t, i, j, float(gain)) for gain in gains]
    curve, slope, _ = np.polyfit(gains, values, 2)
    return float(np.clip((-slope / (2 * curve) + 0.02) / 1.02, *GAIN_RANGE))


@pytest.mark.parametrize("predictor", ["reuse", "published", "fitted"])
def test_prices_are_those_of_the_vectors(predictor: str) -> None:
    stats = random_stats(0)
    for index, unit in enumerate(priced(stats, ("step", "groups"), predictor)):
        finite = np.argwhere(np.isfinite(unit.errors))
        assert len(finite)
        for t, i, j in finite[:: max(1, len(finite) // 60)]:
            place = index - 1 if index else None
            gain = gain_of(stats, place, t, i, j) if predictor == "fitted" else float(j > 0)
            expected = price(stats, place, t, i, j, gain)
            assert unit.errors[t, i, j] == pytest.approx(expected, rel=1e-3, abs=1e-12)
        assert (np.isfinite(unit.errors[:, :, 1:]).any()) == (predictor != "reuse")


def test_no_cell_reaches_beyond_what_was_measured() -> None:
    stats = random_stats(1)
    step, *groups = priced(stats, ("step", "groups"))
    t, i, j = np.indices(groups[0].errors.shape)
    for unit in groups:
        finite = np.isfinite(unit.errors)
        assert (finite == ((t - 1 - i - j >= 0) & (i + j < stats.max_lag))).all()
    t, i, j = np.indices(step.errors.shape)
    assert (np.isfinite(step.errors) <= (t - 1 - i - j >= 0)).all()


def test_a_direction_that_vanishes_has_gain_one() -> None:
    gains = _cell_gains(np.array([0.0, -1e9]), np.array([0.0, 1.0]))
    assert gains.tolist() == [1.0, GAIN_RANGE[1]]


def test_steps_cost_what_they_have_to_do() -> None:
    loads = np.ones((12, 4))
    loads[3], loads[4, 1] = 0.0, 0.5
    stats = random_stats(3, loads=loads)
    alone = priced(stats, ("step",))[0].compute_ms
    step, *groups = priced(stats, ("step", "groups"))
    whole = stats.rest_ms + stats.group_ms.sum()
    assert alone[[0, 3]] == pytest.approx([whole, 0.0])
    assert alone[4] == pytest.approx(whole - 0.5 * stats.group_ms[1])
    assert step.compute_ms[[0, 3]] == pytest.approx([stats.rest_ms, 0.0])
    assert groups[1].compute_ms[[0, 4]] == pytest.approx(stats.group_ms[1] * np.array([1, 0.5]))


def test_steps_of_another_expert_and_first_ones_of_a_segment_are_not_cached() -> None:
    loads = np.ones((12, 4))
    loads[8:] = 0.0
    segments = np.array([0.0] * 3 + [1.0] * 5 + [2.0] * 4)
    stats = random_stats(4, loads=loads, segments=segments)
    assert uncacheable(stats) == {3, 8, 9, 10, 11}
