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

    sum_p u_p ||S_e,p||^2 + RIDGE sum_h d_h (b_ah - b0_ah)^2,

d_h the weighted square of the move that b_ah multiplies, b0 the second-order method of Adams and
Bashforth, and u_p the inverse of the error that prompt p is left with (three rounds), so that what
falls is the mean of decibels. Errors are paid back at the next computed step, before they grow, and
no row relies on a later one. That is why the rows hold on the accelerated run, whose velocities are
not quite those of the fit; a joint least squares over all rows leans on cancellations that the
accelerated run does not make (docs/findings.md has the comparison).

All errors are combinations of velocities with the same coefficients for every prompt, so the fit
needs nothing but each prompt's T x T Gram matrix.

Source: linear multistep methods with fitted coefficients are known (Shaul et al., arXiv 2403.01329,
fits them by gradients through the model); the fit from calibration statistics is this project's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from layercache.solver.problem import BoolArray, FloatArray
from layercache.stats import CalibrationStats

DEPTH = 4
"""Earlier computed steps that a row may use. Two lost 0.4 dB, six gained 0.05 (mean of four
budgets, 32 validation prompts)."""
RIDGE = 0.01
"""0.03 lost 0.3 dB; 0.001 lost 0.4 at half the compute and won nothing elsewhere."""
DECIMALS = 6
_ROUNDS = 3
_SPREAD = 100.0
"""No prompt counts for more than this many times the typical one."""


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


def fit_multistep(stats: CalibrationStats, run: BoolArray, depth: int = DEPTH) -> MultistepFit:
    """Fit the coefficients of a step schedule.

    Args:
        stats: The statistics.
        run: (T,) whether each step is computed; step 0 is.
        depth: Most earlier computed steps that a row may use.

    Example:
        >>> fit = fit_multistep(stats, plan.run_steps)  # doctest: +SKIP
        >>> fit.taps[20]  # doctest: +SKIP
        (0.731, -0.204, 0.05, -0.011)
    """
    velocities = np.asarray(stats.velocities, dtype=np.float64)
    gram: FloatArray = velocities @ velocities.swapaxes(1, 2)
    sigmas = np.asarray(stats.sigmas, dtype=np.float64)
    dsigma, growth = np.diff(sigmas), np.append(stats.propagation, stats.propagation[-1])
    computed = np.flatnonzero(run)
    skipped = np.flatnonzero(~np.asarray(run, dtype=bool))
    first = int(skipped[0]) if len(skipped) else len(dsigma)
    taps: list[tuple[float, ...]] = [()] * len(dsigma)
    # S as coefficients of the velocities: one row that all prompts share.
    error: FloatArray = np.zeros(len(dsigma))
    for number, (start, stop) in enumerate(
        zip(computed, [*computed[1:], len(dsigma)], strict=True)
    ):
        length = sigmas[stop] - sigmas[start]
        error = error * (growth[start] / growth[stop])
        error[start:stop] -= dsigma[start:stop]
        error[start] += length
        if number == 0 or stop <= first or depth < 1:
            continue  # no earlier velocity, or nothing to make good
        earlier = computed[max(0, number - depth) : number][::-1]
        moves: FloatArray = np.zeros((len(earlier), len(dsigma)))
        moves[:, start] = length
        moves[np.arange(len(earlier)), earlier] -= length
        prior = np.zeros(len(earlier))
        prior[0] = 0.5 * length / (sigmas[start] - sigmas[earlier[0]])
        found = np.round(prior + _row(gram, error + prior @ moves, moves), DECIMALS)
        error = error + found @ moves
        taps[start] = tuple(found.tolist())
    final = np.einsum("s,pst,t->p", error, gram, error) * stats.propagation[-1] ** 2
    return MultistepFit(tuple(taps), np.maximum(final, 0.0) / stats.numel)


def _row(gram: FloatArray, rest: FloatArray, moves: FloatArray) -> FloatArray:
    """(h,) what to add to the prior, whose error is `rest`; errors and moves over velocities."""
    seen = moves @ gram
    right, normal = seen @ rest, seen @ moves.T
    square = np.maximum(np.einsum("s,pst,t->p", rest, gram, rest), 1e-300)
    weights, found = 1 / square, np.zeros(len(moves))
    for _ in range(_ROUNDS):
        weights = weights / weights.sum()
        total = np.tensordot(weights, normal, axes=1)
        # A move that no prompt makes keeps its prior; the floor makes the system regular.
        size = np.sqrt(np.maximum(np.diagonal(total), 1e-12 * max(total.max(), 1e-300)))
        system = total / size[:, None] / size + RIDGE * np.eye(len(size))
        found = -np.linalg.solve(system, (weights @ right) / size) / size
        left = square + 2 * right @ found + (normal @ found) @ found
        floor = np.exp(np.log(np.maximum(left, 1e-300)).mean()) / _SPREAD
        weights = 1 / np.maximum(left, max(floor, 1e-300))
    return found
