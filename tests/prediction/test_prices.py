"""Prices against deltas formed as vectors, one cell at a time (the oracle is `price` below)."""

from __future__ import annotations

import numpy as np
import pytest

from layercache.errors import LayerCacheError
from layercache.solver.pricing import GAIN_RANGE, cell_gains, price_units
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


@pytest.mark.parametrize("mode", ["none", "unit", "cell"])
def test_prices_are_those_of_the_vectors(mode: str) -> None:
    stats = random_stats(0)
    for index, unit in enumerate(price_units(stats, gains=mode)):  # type: ignore[arg-type]
        errors = unit.costs.errors
        finite = np.argwhere(np.isfinite(errors))
        assert len(finite)
        for t, i, j in finite[:: max(1, len(finite) // 60)]:
            expected = price(
                stats, index - 1 if index else None, t, i, j, float(unit.gains[t, i, j])
            )
            assert errors[t, i, j] == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_no_cell_reaches_beyond_what_was_measured() -> None:
    stats = random_stats(1)
    step, *groups = price_units(stats)
    t, i, j = np.indices(groups[0].costs.errors.shape)
    for unit in groups:
        finite = np.isfinite(unit.costs.errors)
        assert (finite == ((t - 1 - i - j >= 0) & (i + j < stats.max_lag))).all()
    t, i, j = np.indices(step.costs.errors.shape)
    assert (np.isfinite(step.costs.errors) <= (t - 1 - i - j >= 0)).all()


def test_a_cells_own_gain_is_its_optimum_up_to_the_pull_towards_one() -> None:
    stats = random_stats(2)
    unit = price_units(stats, ("groups",), "cell")[0]
    t, i, j = 9, 1, 2
    gains = np.linspace(*GAIN_RANGE, 2001)
    prices = [price(stats, 0, t, i, j, float(gain)) for gain in gains]
    best = gains[int(np.argmin(prices))]
    assert unit.gains[t, i, j] == pytest.approx((best + 0.02) / 1.02, abs=0.01)
    assert unit.costs.errors[t, i, j] <= price(stats, 0, t, i, j, 1.0)


def test_a_direction_that_vanishes_has_gain_one() -> None:
    gains = cell_gains(np.array([0.0, -1e9]), np.array([0.0, 1.0]))
    assert gains.tolist() == [1.0, GAIN_RANGE[1]]


def test_the_step_unit_alone_pays_for_the_whole_transformer() -> None:
    stats = random_stats(3)
    alone = price_units(stats, ("step",))[0].costs
    joined = price_units(stats, ("step", "groups"))[0].costs
    assert alone.refresh_ms == pytest.approx(stats.rest_ms + stats.group_ms.sum())
    assert joined.refresh_ms == stats.rest_ms


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"units": ("blocks",)}, "units is ('blocks',); use 'step', 'groups' or both"),
        ({"units": ()}, "units is (); use 'step', 'groups' or both"),
        ({"gains": "best"}, "gains is 'best'; cells have 'none', 'unit' or 'cell'"),
    ],
)
def test_unknown_options_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(LayerCacheError) as error:
        price_units(random_stats(0), **arguments)  # type: ignore[arg-type]
    assert str(error.value) == message
