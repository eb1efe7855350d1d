"""What multistep rows leave of an error, step by step on vectors: the tests' oracle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from layercache.stats import CalibrationStats

Array = np.ndarray


def own_errors(
    stats: CalibrationStats, run: Sequence[bool], taps: Sequence[Sequence[float]]
) -> Iterator[Array]:
    """(P, S) what each step adds to the latent's error, on the uncached run's velocities."""
    velocities = stats.velocities.astype(np.float64)
    computed: list[int] = []
    used = velocities[:, 0]
    for step in range(stats.num_steps):
        if run[step]:
            used = velocities[:, step].copy()
            for tap, earlier in zip(taps[step], reversed(computed), strict=False):
                used += tap * (velocities[:, step] - velocities[:, earlier])
            computed.append(step)
        yield (stats.sigmas[step + 1] - stats.sigmas[step]) * (used - velocities[:, step])


def turned_error(
    stats: CalibrationStats, run: Sequence[bool], taps: Sequence[Sequence[float]]
) -> Array:
    """(P,) final squared error an element if each step's growth turns all errors so far."""
    total: Array = np.zeros_like(stats.velocities[:, 0], dtype=np.float64)
    sums = []
    for own in own_errors(stats, run, taps):
        total = total + own
        sums.append((total**2).sum(axis=1))
    growth = np.append(stats.propagation, 0.0) ** 2
    return np.asarray(-np.diff(growth) @ np.array(sums) / stats.numel)


def grown_error(
    stats: CalibrationStats, run: Sequence[bool], taps: Sequence[Sequence[float]]
) -> Array:
    """(P,) the same if errors keep their direction and grow at each computed step."""
    growth = [*stats.propagation, stats.propagation[-1]]
    total: Array = np.zeros_like(stats.velocities[:, 0], dtype=np.float64)
    for step, own in enumerate(own_errors(stats, run, taps)):
        if run[step]:
            later = [s for s in range(step + 1, stats.num_steps) if run[s]]
            total = total * growth[step] / growth[later[0] if later else stats.num_steps]
        total = total + own
    return np.asarray((total**2).sum(axis=1) * growth[-1] ** 2 / stats.numel)
