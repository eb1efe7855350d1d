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
    total = list(grown_states(stats, run, taps))[-1][1]
    return np.asarray((total**2).sum(axis=1) * stats.propagation[-1] ** 2 / stats.numel)


def grown_states(
    stats: CalibrationStats, run: Sequence[bool], taps: Sequence[Sequence[float]]
) -> Iterator[tuple[int, Array]]:
    """The error (P, S) of the latent before each computed step, and at the end."""
    growth = [*stats.propagation, stats.propagation[-1]]
    total: Array = np.zeros_like(stats.velocities[:, 0], dtype=np.float64)
    for step, own in enumerate(own_errors(stats, run, taps)):
        if run[step]:
            yield step, total
            later = [s for s in range(step + 1, stats.num_steps) if run[s]]
            total = total * growth[step] / growth[later[0] if later else stats.num_steps]
        total = total + own
    yield stats.num_steps, total


def drift(
    stats: CalibrationStats, run: Sequence[bool], taps: Sequence[Sequence[float]], rate: float
) -> Array:
    """(P,) variance at the end of what coefficients make of velocities of latents that are off."""
    growth = [*stats.propagation, stats.propagation[-1]]
    states = list(grown_states(stats, run, taps))
    variances: list[Array] = [np.zeros(len(stats.velocities))]
    for number, (start, state) in enumerate(states[:-1]):
        stop = states[number + 1][0]
        variance = variances[-1] * (growth[start] / growth[stop]) ** 2
        for back, tap in enumerate(taps[start], 1):
            apart = ((state - states[number - back][1]) ** 2).sum(axis=1)
            unsure = apart + variances[number] + variances[number - back]
            variance = variance + ((stats.sigmas[stop] - stats.sigmas[start]) * tap * rate) ** 2 * (
                unsure
            )
        variances.append(variance)
    return np.asarray(variances[-1] * growth[-1] ** 2 / stats.numel)
