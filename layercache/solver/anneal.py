"""Search over step schedules: annealing, then climbing, on a score that a subclass defines.

One computed step moves at a time, their number unchanged:

1. *Annealing* (Kirkpatrick, Gelatt & Vecchi 1983): a random computed step moves to a near place or
   to any, and a worse score is taken with probability exp(-rise / temperature), the temperature
   falling to zero. About T^2 evaluations with a fixed seed: the same statistics give the same plan.
2. *Climbing*: single moves to near places for as long as one helps.

It is a heuristic and proves nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from layercache.solver.pricing import STEP_LAGS
from layercache.solver.problem import BoolArray

MOVES = (1, -1, 2, -2, 3, -3)
NEAR_SHARE = 0.6
TEMPERATURE = 0.02
"""In units of the score, mean log10 of the squared error: 0.2 dB."""
EVALUATIONS = 1.2
"""Annealing moves tried, as a multiple of T^2."""


class ScheduleSearch(ABC):
    """Moves the computed steps of a schedule.

    Args:
        forced: Steps that stay computed.
        max_gap: Most steps between a skipped step and its anchor.
        seed: Of the annealing.
        restarts: Annealings, each with a seed of its own; the best result counts.
    """

    def __init__(
        self,
        *,
        forced: frozenset[int] = frozenset(),
        max_gap: int | None = None,
        seed: int = 0,
        restarts: int = 1,
    ) -> None:
        self.forced = forced | {0}
        self.lags = STEP_LAGS if max_gap is None else min(STEP_LAGS, max_gap)
        self.seeds = range(seed, seed + restarts)

    @abstractmethod
    def score(self, run: BoolArray) -> float:
        """What is made low: mean log10 of a squared error; infinite if impossible."""

    def search(self, run: BoolArray) -> BoolArray:
        """The best schedule found by annealing and climbing, its number of steps unchanged."""
        return min((self.climb(self.anneal(run, seed)) for seed in self.seeds), key=self.score)

    def anneal(self, run: BoolArray, seed: int) -> BoolArray:
        """The best schedule met by random moves under a falling temperature."""
        best, least = run, self.score(run)
        if not np.isfinite(least) or run.all():
            return best
        current, value = best, least
        rng = np.random.default_rng(seed)
        trials = int(EVALUATIONS * len(run) ** 2)
        for trial in range(trials):
            step = int(rng.choice(np.flatnonzero(current)))
            near = rng.random() < NEAR_SHARE
            target = step + int(rng.choice(MOVES)) if near else int(rng.integers(len(run)))
            if not self._movable(current, step, target):
                continue
            moved = _moved(current, step, target)
            score = self.score(moved)
            temperature = TEMPERATURE * (1 - trial / trials)
            if score < value or rng.random() < np.exp((value - score) / temperature):
                current, value = moved, score
            if score < least:
                best, least = moved, score
        return best

    def climb(self, run: BoolArray) -> BoolArray:
        """A schedule that no move of one step to a near place improves."""
        best, least = run, self.score(run)
        improved = bool(np.isfinite(least))
        while improved:
            improved = False
            for step in np.flatnonzero(best).tolist():
                for target in (step + move for move in MOVES):
                    if not self._movable(best, step, target):
                        continue
                    moved = _moved(best, step, target)
                    score = self.score(moved)
                    if score < least:
                        best, least, improved = moved, score, True
                        break
        return best

    def _movable(self, run: BoolArray, step: int, target: int) -> bool:
        inside = 0 <= target < len(run)
        return inside and bool(run[step]) and not run[target] and step not in self.forced


def _moved(run: BoolArray, step: int, target: int) -> BoolArray:
    moved = run.copy()
    moved[[step, target]] = False, True
    return moved
