"""Simulated annealing over anything, on a score that is given.

A random neighbour is taken if its score is lower, and with probability exp(-rise / temperature) if
it is not; the temperature falls linearly to zero (Kirkpatrick, Gelatt & Vecchi 1983). It is a
heuristic and proves nothing. The generator's seed is fixed, scores are compared as they come, and
nothing depends on time: the same start gives the same result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

State = TypeVar("State")

TEMPERATURE = 0.02
"""In units of the score, mean log10 of the squared error: 0.2 dB."""


def anneal(
    start: State,
    score: Callable[[State], float],
    neighbour: Callable[[State, np.random.Generator], State | None],
    trials: int,
    seed: int,
) -> tuple[State, float]:
    """The best state met, and its score.

    Args:
        start: Where to begin.
        score: What is made low; infinite if a state is not allowed.
        neighbour: A random state near another, or None where the draw leads nowhere.
        trials: How many neighbours are drawn.
        seed: Of the draws.

    Example:
        >>> anneal(9, lambda x: (x - 2) ** 2, lambda x, rng: x + int(rng.integers(-1, 2)), 200, 0)
        (2, 0)
    """
    rng = np.random.default_rng(seed)
    current = best = start
    value = least = score(start)
    for trial in range(trials):
        drawn = neighbour(current, rng)
        chance = rng.random()
        if drawn is None:
            continue
        found = score(drawn)
        temperature = TEMPERATURE * (1 - trial / trials)
        if found < value or chance < np.exp(min((value - found) / temperature, 0.0)):
            current, value = drawn, found
        if found < least:
            best, least = drawn, found
    return best, least
