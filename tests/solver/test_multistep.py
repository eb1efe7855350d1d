"""Multistep coefficients. Oracle: the error of every prompt as a vector, step by step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layercache.solver.gains import mean_log10
from layercache.solver.multistep import DECIMALS, DEPTH, Multistep
from layercache.stats import CalibrationStats
from tests.solver.multistep_oracle import drift, grown_error, turned_error
from tests.solver.strategies import random_stats


def random_run(rng: np.random.Generator, steps: int) -> np.ndarray:
    run = rng.random(steps) < rng.uniform(0.3, 0.9)
    run[0] = True
    return run


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_the_foreseen_error_is_the_direct_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    stats = random_stats(seed)
    run = random_run(rng, stats.num_steps)
    fit = Multistep(stats).fit(run, depth=int(rng.integers(0, 6)))
    assert fit.error == pytest.approx(grown_error(stats, run, fit.taps), rel=1e-4, abs=1e-12)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(0, 5))
def test_taps_stand_where_a_plan_may_have_them(seed: int, depth: int) -> None:
    stats = random_stats(seed)
    run = random_run(np.random.default_rng(seed), stats.num_steps)
    fit = Multistep(stats).fit(run, depth)
    first = int(np.flatnonzero(~run)[0]) if not run.all() else stats.num_steps
    for step, taps in enumerate(fit.taps):
        before = int(run[:step].sum())
        # What ends before the first skipped step is exact as it is.
        corrected = run[step] and before > 0 and step + 1 >= first and not run.all()
        assert len(taps) == (min(before, depth) if corrected else 0)
        assert all(tap == round(tap, DECIMALS) for tap in taps)


def test_velocities_on_a_line_are_followed() -> None:
    stats = random_stats(3, noise=0.0)
    rng = np.random.default_rng(0)
    start, slope = rng.standard_normal((2, *stats.velocities[:, :1].shape))
    straight = start + slope * stats.sigmas[:-1, None]
    stats = replace(stats, velocities=straight.astype(np.float32))
    run = np.arange(stats.num_steps) % 3 != 2
    plain = grown_error(stats, run, ((),) * stats.num_steps)
    assert (Multistep(stats).fit(run).error < 1e-4 * plain).all()


@pytest.mark.parametrize("seed", range(5))
def test_more_earlier_velocities_do_not_hurt_the_fit(seed: int) -> None:
    stats = random_stats(seed, prompts=6)
    run = np.arange(stats.num_steps) % 2 == 0
    none, one, most = (
        np.log(Multistep(stats).fit(run, depth).error).mean() for depth in (0, 1, DEPTH)
    )
    assert one < none - 0.3 and most < one + 0.2


@settings(max_examples=10)
@given(st.integers(0, 1000))
def test_neither_order_nor_size_of_prompts_matters(seed: int) -> None:
    stats = random_stats(seed)
    run = random_run(np.random.default_rng(seed), stats.num_steps)
    fit = Multistep(stats).fit(run)
    turned = Multistep(stats.select([2, 0, 3, 1])).fit(run)
    louder = Multistep(replace(stats, velocities=1024 * stats.velocities)).fit(run)
    for other in (turned, louder):
        for mine, theirs in zip(fit.taps, other.taps, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def test_velocities_that_stand_still_leave_nothing_to_fit() -> None:
    stats = random_stats(1)
    still = np.broadcast_to(stats.velocities[:, :1], stats.velocities.shape).copy()
    fit = Multistep(replace(stats, velocities=still)).fit(np.arange(stats.num_steps) % 2 == 0)
    assert np.isfinite([tap for taps in fit.taps for tap in taps]).all()
    assert fit.error == pytest.approx(0.0, abs=1e-10)


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_the_predicted_error_counts_growth_as_that_of_gains_does(seed: int) -> None:
    stats = random_stats(seed)
    run = random_run(np.random.default_rng(seed), stats.num_steps)
    rows = Multistep(stats)
    taps = rows.fit(run).taps
    direct = turned_error(stats, run, taps)
    assert rows.predicted_error(run, taps) == pytest.approx(direct, rel=1e-4, abs=1e-12)


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.integers(0, 5))
def test_schedules_are_scored_by_the_error_and_by_what_is_unsure_of_it(
    seed: int, depth: int
) -> None:
    rng = np.random.default_rng(seed)
    stats = random_stats(seed)
    run = random_run(rng, stats.num_steps)
    taps: list[tuple[float, ...]] = []
    rows = Spied(stats, taps)
    score = rows.score(run, 1e-3, depth)
    total = grown_error(stats, run, taps) + drift(stats, run, taps, rows.rate)
    assert score == pytest.approx(mean_log10(total), rel=1e-4, abs=1e-4)


class Spied(Multistep):
    """Tells the coefficients that a score is of."""

    def __init__(self, stats: CalibrationStats, taps: list[tuple[float, ...]]) -> None:
        super().__init__(stats)
        self.taps = taps

    def _walk(self, *arguments: Any) -> Any:
        found = super()._walk(*arguments)
        self.taps[:] = found[0]
        return found


def test_the_rate_is_that_of_the_growth_and_at_least_1() -> None:
    stats = random_stats(0)
    still = replace(stats, amplification=np.ones_like(stats.amplification))
    assert Multistep(still).rate == 1.0
    sigmas = np.asarray(stats.sigmas)[:-1]
    grown = np.broadcast_to(np.exp(3 * sigmas), stats.amplification.shape)
    expected = 3 * (sigmas[0] - sigmas[-1]) / (stats.sigmas[0] - stats.sigmas[-1])
    assert Multistep(replace(stats, amplification=grown)).rate == pytest.approx(expected, rel=1e-4)
