"""Multistep coefficients: mean velocities from several computed steps, fitted row by row.

Let a be a computed step and e the next one (or the end). What happens between them is one move of
the latent, z_e = z_a + (sigma_e - sigma_a) m_a, by the mean velocity

    m_a = v_a + sum_h b_ah (v_a - v_{a_h}),       a_h the h-th computed step before a,

a linear multistep method. The whole stretch follows m_a, so whatever skipped steps in between could
be predicted to be, the next computed step sees the same latent. With S_a the error of the latent at
a and v the exact velocities, the error at e is

    S_e = g S_a + (sigma_e - sigma_a) m_a - sum over a <= t < e of dsigma_t v_t,      g = A_a / A_e,

where A is the growth of an error until the end (`stats.propagation`). Each row minimises the error
at the end of its own stretch, given what the rows before have left:

    sum_p u_p ||S_e,p||^2 + ridge sum_h d_h (b_ah - b0_ah)^2,

d_h the weighted square of the move that b_ah multiplies, b0 the second-order method of Adams and
Bashforth, u_p the inverse of the error that prompt p is left with (three rounds), so that what
falls is the mean of decibels, and the ridge the one that is best on prompts left out. Errors are
paid back at the next computed step, before they grow, and no row relies on a later one. That is why
the rows hold on the accelerated run, whose velocities are not quite those of the fit; a joint least
squares over all rows leans on cancellations that the accelerated run does not make
(bench/FINDINGS.md has the comparison).

All errors are combinations of velocities with the same coefficients for every prompt, so the fit
needs nothing but each prompt's T x T Gram matrix.

What schedules are compared by (`score`) also counts that the accelerated run's velocities are those
of latents that are off. The part of it that lets errors grow is in A; a coefficient b_ah multiplies
besides how differently off v_a and v_{a_h} are, of which no more is known than a size,

    D_e = g^2 D_a + sum_h ((sigma_e - sigma_a) b_ah rate)^2 (||S_a - S_{a_h}||^2 + D_a + D_{a_h}),

a variance that adds to ||S_e||^2. The rate, of the velocity by the latent, is the mean rate of the
growth, (log A_0 - log A_T) / (sigma_0 - sigma_T), at least 1. Without this term a search finds
schedules whose coefficients are large, and on which the accelerated run does not do as foreseen.

Source: linear multistep methods with fitted coefficients are known (Shaul et al., arXiv 2403.01329,
fits them by gradients through the model); the fit from calibration statistics is this project's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from layercache.solver.gains import mean_log10
from layercache.solver.problem import BoolArray, FloatArray
from layercache.stats import CalibrationStats

DEPTH = 4
"""Earlier computed steps that a row may use. Two lost 0.4 dB, six gained 0.05 (mean of four
budgets, 32 validation prompts)."""
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
DECIMALS = 6
LEAST_RATE = 1.0
"""How fast a velocity changes with its latent, whatever the growth: for Gaussian data it is 1 at
both ends of a straight path."""
_ROUNDS = 3
_SPREAD = 100.0
"""No prompt counts for more than this many times the typical one."""
_TINY = 1e-300


def depth_for(history: int) -> int:
    """How many earlier computed steps rows may use in a plan with so much history."""
    return DEPTH if history > 0 else 0


@dataclass(frozen=True, eq=False)
class MultistepFit:
    """Rows of a schedule.

    Attributes:
        taps: For each of T steps the coefficients b_1, b_2, ... of a computed step, rounded as plan
            files are; empty at skipped steps, and up to the first of them.
        error: (P,) mean squared error per element of the final latent, as the fit foresees it.
    """

    taps: tuple[tuple[float, ...], ...]
    error: FloatArray


class Multistep:
    """Fits schedules of one set of statistics.

    Example:
        >>> fit = Multistep(stats).fit(np.array(plan.run_steps))  # doctest: +SKIP
        >>> fit.taps[20]  # doctest: +SKIP
        (0.731, -0.204, 0.05, -0.011)
    """

    def __init__(self, stats: CalibrationStats) -> None:
        velocities = np.asarray(stats.velocities, dtype=np.float64)
        self.gram: FloatArray = velocities @ velocities.swapaxes(1, 2)
        self.sigmas = np.asarray(stats.sigmas, dtype=np.float64)
        self.growth = np.append(stats.propagation, stats.propagation[-1])
        grown = np.log(self.growth[0] / self.growth[-1])
        self.rate = max(LEAST_RATE, float(grown / (self.sigmas[0] - self.sigmas[-1])))
        self.numel = stats.numel

    def fit(self, run: BoolArray, depth: int = DEPTH) -> MultistepFit:
        """The coefficients of a step schedule.

        Args:
            run: (T,) whether each step is computed; step 0 is.
            depth: Most earlier computed steps that a row may use.
        """
        taps, error, _ = self._walk(run, depth, lambda row: np.round(_fitted(row), DECIMALS))
        return MultistepFit(taps, error)

    def score(self, run: BoolArray, ridge: float, depth: int = DEPTH) -> float:
        """Mean log10 of the error that rows with one and the same ridge would leave, D included."""

        def solve(row: _Row) -> FloatArray:
            found: FloatArray = row.prior + row.solve(1 / row.square[None], ridge)[0]
            return found

        _, error, drift = self._walk(run, depth, solve)
        return mean_log10(error + drift)

    def predicted_error(self, run: BoolArray, taps: Sequence[Sequence[float]]) -> FloatArray:
        """(P,) predicted mean squared error of the final latent, as that of gains is predicted.

        Products of errors made at two steps count with the growth since the later one: see
        `solver.gains`, whose figures it can be compared with.
        """
        steps = len(self.sigmas) - 1
        made: FloatArray = -np.eye(steps)
        mean: FloatArray = np.zeros(steps)
        computed: list[int] = []
        for step in range(steps):
            if run[step]:
                mean = np.zeros(steps)
                mean[step] = 1 + sum(taps[step])
                for tap, earlier in zip(taps[step], reversed(computed), strict=False):
                    mean[earlier] -= tap
                computed.append(step)
            made[step] += mean
        made *= np.diff(self.sigmas)[:, None]
        order = np.arange(steps)
        weight = self.growth[np.maximum(order[:, None], order)] ** 2
        total = np.array([(made @ gram @ made.T * weight).sum() for gram in self.gram])
        result: FloatArray = np.maximum(total, 0.0) / self.numel
        return result

    def _walk(
        self, run: BoolArray, depth: int, solve: Callable[[_Row], FloatArray]
    ) -> tuple[tuple[tuple[float, ...], ...], FloatArray, FloatArray]:
        """Coefficients of every step as `solve` finds them, and the final ||S||^2 and D (P,)."""
        sigmas, gram, steps = self.sigmas, self.gram, len(self.sigmas) - 1
        dsigma = np.diff(sigmas)
        run = np.asarray(run, dtype=bool)
        computed = np.flatnonzero(run)
        first = steps if run.all() else int(np.argmin(run))
        taps: list[tuple[float, ...]] = [()] * steps
        # S as coefficients of the velocities: one row that all prompts share.
        error: FloatArray = np.zeros(steps)
        drift: FloatArray = np.zeros(len(gram))
        # At each computed step S, Gram matrices times S, and ||S||^2 + D.
        passed: list[tuple[FloatArray, FloatArray, FloatArray]] = []
        stops = [*computed[1:].tolist(), steps]
        for number, (start, stop) in enumerate(zip(computed.tolist(), stops, strict=True)):
            length = sigmas[stop] - sigmas[start]
            seen = gram @ error
            passed.append((error, seen, seen @ error + drift))
            grown = self.growth[start] / self.growth[stop]
            error, drift = error * grown, drift * grown**2
            error[start:stop] -= dsigma[start:stop]
            error[start] += length
            if number == 0 or stop <= first or depth < 1:
                continue  # no earlier velocity, or nothing to make good
            earlier = computed[max(0, number - depth) : number][::-1]
            prior = np.zeros(len(earlier))
            prior[0] = 0.5 * length / (sigmas[start] - sigmas[earlier[0]])
            found = solve(_row(gram, error, start, earlier, length, prior))
            error[start] += length * found.sum()
            error[earlier] -= length * found
            taps[start] = tuple(found.tolist())
            drift = drift + (length * self.rate) ** 2 * (found**2 @ _apart(passed, len(found)))
        scale = self.growth[-1] ** 2 / self.numel
        final = np.maximum((gram @ error) @ error, 0.0)
        return tuple(taps), final * scale, drift * scale


def _apart(passed: Sequence[tuple[FloatArray, FloatArray, FloatArray]], count: int) -> FloatArray:
    """(count, P) ||S_a - S_{a_h}||^2 + D_a + D_{a_h} of the last computed step and those before."""
    error, _, square = passed[-1]
    apart = [other + square - 2 * (seen @ error) for _, seen, other in passed[-1 - count : -1]]
    return np.maximum(np.array(apart[::-1]), 0.0)


def _fitted(row: _Row) -> FloatArray:
    """The coefficients, with weights and ridge chosen."""
    count = len(row.square)
    everyone = np.ones((1, count))
    others = 1 - np.eye(count) if count > 1 else everyone
    weights = 1 / row.square
    found: FloatArray = np.zeros(len(row.prior))
    least = np.inf
    for _ in range(_ROUNDS):
        tried = {ridge: row.score(row.solve(others * weights, ridge)) for ridge in RIDGES}
        ridge = min(tried, key=tried.__getitem__)
        least = tried[ridge]
        (found,) = row.solve(everyone * weights, ridge)
        left = row.left(found[None])
        weights = 1 / np.maximum(left, np.exp(np.log(left).mean()) / _SPREAD)
    if least >= row.score(np.zeros((1, len(found)))):
        return row.prior  # on prompts left out the fit does no good
    return row.prior + found


@dataclass(frozen=True, eq=False)
class _Row:
    """One row's least squares, by inner products of each prompt.

    Shapes: prior (h,); square (P,) of the error under the prior; right (P, h) and normal (P, h, h)
    of the moves; loud (P,) what a move would be if nothing in it cancelled.
    """

    prior: FloatArray
    square: FloatArray
    right: FloatArray
    normal: FloatArray
    loud: FloatArray

    def solve(self, weights: FloatArray, ridge: float) -> FloatArray:
        """(K, h) what to add to the prior, for K weightings (K, P) of the prompts."""
        weights = weights / weights.sum(axis=1, keepdims=True)
        total = np.tensordot(weights, self.normal, axes=1)
        # Where velocities stand still a move is but rounding, and keeps its prior.
        floor = np.maximum(1e-12 * (weights @ self.loud), _TINY)[:, None]
        size = np.sqrt(np.maximum(np.diagonal(total, axis1=1, axis2=2), floor))
        system = total / size[:, :, None] / size[:, None, :] + ridge * np.eye(size.shape[1])
        right = weights @ self.right / size
        result: FloatArray = -np.linalg.solve(system, right[..., None])[..., 0] / size
        return result

    def left(self, found: FloatArray) -> FloatArray:
        """(P,) squared error of each prompt under its own coefficients (P, h), or shared (1, h)."""
        seen = (self.normal @ found[..., None])[..., 0]
        left = self.square + (found * (2 * self.right + seen)).sum(axis=1)
        # What is left of a perfect fit is rounding, and may come out below 0.
        result: FloatArray = np.maximum(left, 1e-12 * self.square)
        return result

    def score(self, found: FloatArray) -> float:
        """Mean log of the squared error: up to constants, of decibels."""
        return float(np.log(self.left(found)).mean())


def _row(
    gram: FloatArray,
    error: FloatArray,
    start: int,
    earlier: NDArray[np.int64],
    length: float,
    prior: FloatArray,
) -> _Row:
    """The inner products of the moves `length (v_start - v_earlier)` and of the error so far."""
    rest = error.copy()
    rest[start] += length * prior.sum()
    rest[earlier] -= length * prior
    seen = gram @ rest
    own, crossed = gram[:, start, start], gram[:, start][:, earlier]
    among = gram[:, earlier[:, None], earlier]
    return _Row(
        prior=prior,
        square=np.maximum(seen @ rest, _TINY),
        right=length * (seen[:, start, None] - seen[:, earlier]),
        normal=length**2 * (own[:, None, None] - crossed[:, :, None] - crossed[:, None, :] + among),
        loud=length**2 * own,
    )
