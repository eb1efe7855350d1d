"""The search over multistep schedules. Oracle: every schedule of a small problem."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from layercache.solver.multistep import Multistep
from layercache.solver.multistep_search import MultistepSearch
from tests.solver.strategies import random_stats

STEPS, COMPUTED = 10, 5


def every_run() -> list[np.ndarray]:
    runs = []
    for chosen in itertools.combinations(range(1, STEPS), COMPUTED - 1):
        run = np.zeros(STEPS, dtype=bool)
        run[[0, *chosen]] = True
        runs.append(run)
    return runs


@pytest.mark.parametrize("seed", range(4))
def test_the_search_comes_close_to_the_best_of_all(seed: int) -> None:
    search = MultistepSearch(Multistep(random_stats(seed, steps=STEPS)))
    scores = sorted(search.score(run) for run in every_run())
    start = np.arange(STEPS) < COMPUTED
    found = search.search(start)
    assert found[0] and found.sum() == COMPUTED
    assert search.score(found) <= scores[len(scores) // 50]


def test_only_a_better_schedule_is_handed_out() -> None:
    search = MultistepSearch(Multistep(random_stats(0, steps=STEPS)))
    ordered = sorted(every_run(), key=search.score)
    best, worst = ordered[0], ordered[-1]
    found = search.better(worst)
    assert found is not None and search.score(found) < search.score(worst)
    assert search.better(best) is None
    assert search.better(np.ones(STEPS, dtype=bool)) is None


def test_forced_steps_and_the_longest_gap_are_kept() -> None:
    search = MultistepSearch(
        Multistep(random_stats(2, steps=STEPS)), forced=frozenset({4, 9}), max_gap=2
    )
    run = np.array([step in (0, 2, 4, 6, 9) for step in range(STEPS)])
    found = search.search(run)
    assert found[[0, 4, 9]].all()
    assert np.diff(np.flatnonzero([*found, True])).max() <= 3
    assert search.score(np.arange(STEPS) < COMPUTED) == float("inf")


def test_the_same_statistics_give_the_same_schedule() -> None:
    start = np.arange(STEPS) < COMPUTED
    first, second = (
        MultistepSearch(Multistep(random_stats(1, steps=STEPS))).search(start) for _ in range(2)
    )
    assert (first == second).all()
