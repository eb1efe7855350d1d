"""Statistics of trajectories whose predictions are known, and the error model in plain loops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from layercache.stats import CalibrationStats
from tests.prediction.strategies import random_stats


def polynomial_stats(degree: int, seed: int = 0, **shape: Any) -> CalibrationStats:
    """Velocities and residuals that are polynomials in sigma, of each prompt its own.

    The delta of a group at lag h is then r(sigma_{t-h}) - r(sigma_t).
    """
    stats = random_stats(seed, **shape)
    rng = np.random.default_rng(seed)
    sigma = stats.sigmas[:-1].astype(float)
    powers = np.stack([sigma**k for k in range(degree + 1)])
    prompts, steps, groups, lags, size = stats.deltas.shape
    velocities = np.einsum("kt,kps->pts", powers, rng.standard_normal((degree + 1, prompts, size)))
    residuals = np.einsum(
        "kt,kpgs->ptgs", powers, 0.1 * rng.standard_normal((degree + 1, prompts, groups, size))
    )
    deltas = np.zeros(stats.deltas.shape)
    for t in range(steps):
        for lag in range(1, min(lags, t) + 1):
            deltas[:, t, :, lag - 1] = residuals[:, t - lag] - residuals[:, t]
    return replace(
        stats,
        velocities=velocities.astype(np.float32),
        latents=np.zeros((0, 0, 0)),
        deltas=deltas.astype(np.float32),
    )


def random_table(seed: int, steps: int, groups: int, *, skips: bool = True) -> np.ndarray:
    """(T, 1+G) a schedule whose gaps are at most 3 steps."""
    rng = np.random.default_rng(seed)
    computed = np.ones((steps, 1 + groups), dtype=bool)
    for step in range(1, steps):
        if skips and computed[max(step - 3, 0) : step, 0].any() and rng.random() < 0.3:
            computed[step] = False
            continue
        for column in range(1, 1 + groups):
            near = computed[max(step - 3, 0) : step, column].any()
            computed[step, column] = not near or rng.random() < 0.6
    return computed
