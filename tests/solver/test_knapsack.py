"""The multiple-choice knapsack on real numbers. Oracle: all combinations of options."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layercache.solver._knapsack import Options, least_cost, solve_knapsack


def random_options(seed: int, units: int, options: int, *, sizes: int = 3) -> list[Options]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(units):
        error = rng.random(options) ** 3
        error[rng.random(options) < 0.1] = np.inf
        found.append(
            Options(rng.random(options) * 5, rng.integers(0, sizes, options).astype(float), error)
        )
    return found


def brute_force(units: list[Options], cost_limit: float, size_limit: float) -> float:
    best = np.inf
    for picks in itertools.product(*(range(len(u.cost)) for u in units)):
        pairs = list(zip(units, picks, strict=True))
        if sum(u.cost[k] for u, k in pairs) > cost_limit:
            continue
        if sum(u.size[k] for u, k in pairs) > size_limit:
            continue
        best = min(best, sum(float(u.error[k]) for u, k in pairs))
    return best


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.floats(0, 15), st.sampled_from([np.inf, 1.0, 3.0]))
def test_the_choice_is_the_least_of_all(seed: int, cost: float, size: float) -> None:
    units = random_options(seed, 3, 6)
    best = brute_force(units, cost, size)
    choice = solve_knapsack(units, cost, size)
    if choice is None:
        assert best == np.inf
        return
    assert choice.error == pytest.approx(best, rel=1e-9)
    assert choice.lower_bound == pytest.approx(best, rel=1e-9)
    pairs = list(zip(units, choice.picks, strict=True))
    assert sum(u.cost[k] for u, k in pairs) <= cost
    assert sum(u.size[k] for u, k in pairs) <= size
    assert sum(u.error[k] for u, k in pairs) == pytest.approx(choice.error)


@pytest.mark.parametrize("seed", range(12))
def test_a_beam_without_room_still_bounds_the_optimum(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = random_options(seed, 5, 6, sizes=1)
    best = brute_force(units, 10.0, np.inf)
    monkeypatch.setattr("layercache.solver._knapsack._WIDTHS", (1,))
    choice = solve_knapsack(units, 10.0, np.inf)
    assert choice is not None
    assert choice.lower_bound <= best * (1 + 1e-9)
    assert choice.error >= best * (1 - 1e-9)


def test_the_least_cost_respects_the_size() -> None:
    unit = Options(np.array([1.0, 5.0]), np.array([2.0, 0.0]), np.array([1.0, 0.0]))
    assert least_cost([unit, unit], np.inf) == 2
    assert least_cost([unit, unit], 2) == 6
    assert least_cost([unit, unit], 0) == 10
    assert least_cost([unit, unit], -1) == np.inf


def test_many_units_with_different_times_are_closed() -> None:
    rng = np.random.default_rng(0)
    counts = np.arange(1, 51)
    units = [
        Options(counts * ms, np.zeros(50), level * (50 / counts - 1) ** 1.5)
        for ms, level in zip(rng.uniform(0.8, 1.2, 60), rng.uniform(0.5, 3, 60), strict=True)
    ]
    choice = solve_knapsack(units, 1500.0, np.inf)
    assert choice is not None
    assert choice.lower_bound >= choice.error * (1 - 1e-9)
