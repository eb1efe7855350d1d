"""Least-squares fit of one row of a multistep method: what a closed-loop fit does at each step.

A row says how much of each basis vector (earlier velocities, the noise) makes the next state. It is
fitted over prompts, pulled by a ridge towards a prior that is known to work, and weighted so that
the mean of decibels is what falls:

    minimise over c
        sum_p u_p ||target_p - sum_k (prior_k + c_k) basis_pk||^2 + ridge sum_k s_k c_k^2

with u_p the inverse of the error that prompt p is left with (three rounds), s_k the basis vector's
own mean square, and the ridge chosen by leaving one prompt out. If even the best ridge does no good
on prompts left out, the prior stands.

Shape suffixes: P prompts, K basis vectors, N elements.

Source: non-stationary solvers (Shaul et al., arXiv 2403.01329) fit such rows by gradients; ridge,
prior and weights are this project's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RIDGES = (1e-9, 1e-7, 1e-5, 1e-3, 1e-1)
_REWEIGHTINGS = 3


def fit_row(basis: Array, target: Array, prior: Array) -> Array:
    """Ridge least squares for one row.

    Args:
        basis: (P, K, N) noise and velocities of P prompts.
        target: (P, N).
        prior: (K,) coefficients that the ridge pulls towards.

    Each basis vector is penalised in units of its own size.
    """
    rest = target - np.einsum("k,pkn->pn", prior, basis)
    gram = np.einsum("pkn,pln->pkl", basis, basis) / basis.shape[2]
    right = np.einsum("pkn,pn->pk", basis, rest) / basis.shape[2]
    square = (rest**2).mean(1)
    weights = 1 / np.maximum(square, _floor(square))
    ridge, solution = RIDGES[-1], np.zeros(len(prior))
    for _ in range(_REWEIGHTINGS):
        ridge = min(RIDGES, key=lambda r: _left_out(gram, right, square, weights, r))
        solution = _solve(gram, right, weights, ridge)
        left = _errors(gram, right, square, solution)
        weights = 1 / np.maximum(left, _floor(left))
    if _left_out(gram, right, square, weights, ridge) >= np.log(np.maximum(square, 1e-30)).mean():
        return prior  # on prompts left out the fit does no good
    result: Array = prior + solution
    return result


def _floor(errors: Array) -> float:
    """No prompt counts more than a hundred times the typical one."""
    return float(max(np.exp(np.log(np.maximum(errors, 1e-30)).mean()) / 100, 1e-30))


def _left_out(gram: Array, right: Array, square: Array, weights: Array, ridge: float) -> float:
    """Mean over prompts of the log error on a prompt that the fit did not see."""
    count = len(gram)
    if count == 1:
        return float(np.log(ridge))  # nothing to leave out: the smallest ridge
    total = 0.0
    for p in range(count):
        kept = np.arange(count) != p
        solution = _solve(gram[kept], right[kept], weights[kept], ridge)
        left = _errors(gram[p : p + 1], right[p : p + 1], square[p : p + 1], solution)
        total += float(np.log(max(float(left[0]), 1e-30)))
    return total / count


def _solve(gram: Array, right: Array, weights: Array, ridge: float) -> Array:
    share = weights / weights.sum()
    normal = np.einsum("p,pkl->kl", share, gram)
    scale = np.sqrt(np.maximum(np.diag(normal), 1e-30))
    normal = normal / scale[:, None] / scale[None, :] + ridge * np.eye(len(scale))
    solution: Array = np.linalg.solve(normal, share @ right / scale) / scale
    return solution


def _errors(gram: Array, right: Array, square: Array, solution: Array) -> Array:
    """(P,) mean squared error of each prompt."""
    explained = 2 * right @ solution - np.einsum("k,pkl,l->p", solution, gram, solution)
    result: Array = np.maximum(square - explained, 0.0)
    return result
