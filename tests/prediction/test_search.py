"""Annealing, moves and the search. Oracle: all schedules of a few steps."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layercache.costs import cell_ms
from layercache.prediction import ErrorModel, Search, Table
from layercache.prediction._anneal import anneal
from layercache.stats import CalibrationStats
from tests.prediction.strategies import random_stats


def table_of(
    stats: CalibrationStats, *, skips: bool = True, groups: bool = False, reach: int = 12
) -> Table:
    times = cell_ms(stats)
    return Table(
        cost=np.column_stack([times[:, -1], times[:, :-1]]),
        fixed=np.arange(stats.num_steps) == 0,
        skips=skips,
        groups=tuple(range(stats.num_groups)) if groups else (),
        step_reach=reach,
        group_reach=min(stats.max_lag, reach),
    )


def search_of(stats: CalibrationStats, **shape: bool) -> Search:
    table = table_of(stats, **shape)
    model = ErrorModel(stats, quick=True, groups=bool(table.groups))
    return Search(model, table)


def test_annealing_finds_the_least_of_a_small_landscape_again_and_again() -> None:
    heights = np.random.default_rng(0).random(40)
    heights[17] = -1.0

    def near(place: int, rng: np.random.Generator) -> int | None:
        found = place + int(rng.integers(-8, 9))
        return found if 0 <= found < 40 else None

    results = [anneal(3, lambda k: float(heights[k]), near, 400, 7) for _ in range(2)]
    assert results[0] == results[1] == (17, -1.0)


def test_annealing_keeps_its_start_if_nothing_is_better() -> None:
    assert anneal(0, lambda x: float(abs(x)), lambda x, rng: x + 1, 50, 0) == (0, 0.0)
    assert anneal(5, lambda x: np.inf, lambda x, rng: None, 50, 0) == (5, np.inf)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.booleans(), st.floats(0.4, 0.9))
def test_neighbours_are_schedules_within_the_budget(seed: int, skips: bool, share: float) -> None:
    stats = random_stats(seed % 3)
    table = table_of(stats, skips=skips, groups=True)
    budget = share * float(table.step_cost.sum())
    rng = np.random.default_rng(seed)
    for start in table.uniform(budget):
        current = start
        for _ in range(20):
            found = table.neighbour(current, budget, rng)
            if found is None:
                continue
            assert table.fits(found, budget) and table.allowed(found)
            assert found[0].all() and not found[~found[:, 0]].any()
            assert skips or found[:, 0].all()
            current = found


def test_schedules_out_of_reach_are_not_allowed() -> None:
    stats = random_stats(0, steps=10, lags=3)
    table = table_of(stats, groups=True, reach=3)
    computed = table.full.copy()
    computed[4:7] = False
    assert table.allowed(computed)
    computed[7] = False
    assert not table.allowed(computed)
    computed = table.full.copy()
    computed[4:7, 2] = False
    assert table.allowed(computed)
    computed[7, 2] = False
    assert not table.allowed(computed)
    # An anchor is so many steps away whether or not the steps between are computed.
    computed[7] = True
    computed[5], computed[6, 2], computed[7, 2] = False, False, False
    assert not table.allowed(computed)


@pytest.mark.parametrize("seed", range(3))
def test_the_search_finds_the_best_of_all_schedules_of_few_steps(seed: int) -> None:
    stats = random_stats(seed, steps=9, prompts=3)
    search = search_of(stats)
    for count in (4, 6, 8):
        found = search.best(float(search.table.step_cost[:count].sum()))
        assert found is not None
        best = np.inf
        for chosen in itertools.combinations(range(1, 9), count - 1):
            mask = np.isin(np.arange(9), (0, *chosen))
            computed = np.repeat(mask[:, None], 1 + stats.num_groups, axis=1)
            best = min(best, search.model.score(computed))
        assert found.score == best


@pytest.mark.parametrize(("skips", "groups"), [(True, False), (False, True), (True, True)])
def test_a_larger_budget_is_never_worse_and_is_used(skips: bool, groups: bool) -> None:
    stats = random_stats(4, steps=16, prompts=3)
    search = search_of(stats, skips=skips, groups=groups)
    full = float(search.table.step_cost.sum())
    last = np.inf
    for share in np.linspace(0.2, 1.0, 33):
        found = search.best(share * full)
        if found is None:
            continue
        assert search.table.fits(found.computed, share * full)
        assert found.score <= last
        last = found.score
    assert last == -np.inf


def test_the_same_statistics_give_the_same_schedule() -> None:
    stats = random_stats(5, steps=16, prompts=3)
    once, again = (search_of(stats, groups=True) for _ in range(2))
    budget = 0.6 * float(once.table.step_cost.sum())
    again.best(0.3 * float(once.table.step_cost.sum()))
    one, other = once.best(budget), again.best(budget)
    assert one is not None and other is not None
    assert (one.computed == other.computed).all() and one.score == other.score
