"""Weighted ridge least squares with leave-one-out: how all taps are fitted.

Taps b are shared by all prompts p, and each prompt is left with an error

    ||rest_p + sum_h (b_h - prior_h) move_ph||^2,

rest_p the error under the prior. They minimise

    sum_p u_p error_p + ridge sum_h d_h (b_h - prior_h)^2

with d_h the weighted mean square of the moves and u_p the inverse of the error that prompt p is
left with (three rounds), so that what falls is the mean of decibels. The ridge is the one that is
best on prompts left out, one at a time; if even that does no good there, the prior stands.

All of it happens on inner products. Shape suffixes: P prompts, h taps, N elements, K fits at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
QUICK_RIDGE = 1e-3
DECIMALS = 6
"""Of taps, as plan files hold them."""
_ROUNDS = 3
_SPREAD = 100.0
"""No prompt counts for more than this many times the typical one."""
_TINY = 1e-300


@dataclass(frozen=True, eq=False)
class LeastSquares:
    """One fit, by inner products of each prompt.

    Attributes:
        prior: (h,) taps that the ridge pulls towards.
        square: (P,) squared error under the prior.
        right: (P, h) products of moves and that error.
        normal: (P, h, h) products of moves.
        loud: (P,) what a move would be if nothing in it cancelled: where moves are but rounding of
            that, the prior stays.
    """

    prior: Array
    square: Array
    right: Array
    normal: Array
    loud: Array

    @classmethod
    def of(cls, rest: Array, moves: Array, prior: Array, loud: Array) -> LeastSquares:
        """From the error under the prior (P, N) and the moves (h, P, N)."""
        square = np.maximum(np.einsum("pn,pn->p", rest, rest), _TINY)
        return cls(
            prior=prior,
            square=square,
            right=np.einsum("hpn,pn->ph", moves, rest),
            normal=np.einsum("hpn,kpn->phk", moves, moves),
            loud=loud,
        )

    def fit(self) -> Array:
        """(h,) taps, with weights and ridge chosen."""
        count = len(self.square)
        everyone = np.ones((1, count))
        others = 1 - np.eye(count) if count > 1 else everyone
        weights = 1 / self.square
        found: Array = np.zeros(len(self.prior))
        least = np.inf
        for _ in range(_ROUNDS):
            tried = {ridge: self._score(self.solve(others * weights, ridge)) for ridge in RIDGES}
            ridge = min(tried, key=tried.__getitem__)
            least = tried[ridge]
            (found,) = self.solve(everyone * weights, ridge)
            left = self.left(found[None])
            weights = 1 / np.maximum(left, np.exp(np.log(left).mean()) / _SPREAD)
        if least >= self._score(np.zeros((1, len(found)))):
            return self.prior
        return self.prior + found

    def solve(self, weights: Array, ridge: float) -> Array:
        """(K, h) what to add to the prior, for K weightings (K, P) of the prompts."""
        weights = weights / weights.sum(axis=1, keepdims=True)
        total = np.tensordot(weights, self.normal, axes=1)
        floor = np.maximum(1e-12 * (weights @ self.loud), _TINY)[:, None]
        size = np.sqrt(np.maximum(np.diagonal(total, axis1=1, axis2=2), floor))
        system = total / size[:, :, None] / size[:, None, :] + ridge * np.eye(size.shape[1])
        right = weights @ self.right / size
        result: Array = -np.linalg.solve(system, right[..., None])[..., 0] / size
        return result

    def left(self, found: Array) -> Array:
        """(P,) squared error of each prompt under its own additions (P, h), or shared (1, h)."""
        seen = (self.normal @ found[..., None])[..., 0]
        left = self.square + (found * (2 * self.right + seen)).sum(axis=1)
        # What is left of a perfect fit is rounding, and may come out below 0.
        result: Array = np.maximum(left, 1e-12 * self.square)
        return result

    def _score(self, found: Array) -> float:
        """Mean log of the squared error: up to constants, of decibels."""
        return float(np.log(self.left(found)).mean())


def quick_fit(rest: Array, moves: Array, prior: Array) -> Array:
    """(h,) taps with one round of weights and one ridge: what schedules are searched with.

    Args:
        rest: (P, N) the error under the prior.
        moves: (h, P, N).
        prior: (h,) taps.
    """
    # Imported when used, as all of scipy. For systems of four it takes 1 us where numpy takes 8.
    from scipy.linalg.lapack import dposv

    square = np.maximum(np.einsum("pn,pn->p", rest, rest), _TINY)
    count = len(moves)
    # Weights are the inverse of each prompt's squared error.
    scale = np.sqrt(square.min() / square)[:, None]
    flat = (moves * scale).reshape(count, -1)
    normal = flat @ flat.T
    normal.flat[:: count + 1] += np.maximum(QUICK_RIDGE * normal.diagonal(), _TINY)
    _, found, _ = dposv(normal, flat @ (rest * scale).ravel())
    taps: Array = prior - found
    return taps


def fit_row(basis: Array, target: Array, prior: Array) -> Array:
    """(h,) coefficients that make `target` (P, N) of `basis` (P, h, N).

    Example:
        >>> basis = np.random.default_rng(0).standard_normal((3, 2, 8))
        >>> fit_row(basis, 2 * basis[:, 0] - basis[:, 1], np.zeros(2)).round(3)
        array([ 2., -1.])
    """
    moves = basis.swapaxes(0, 1)
    rest = np.tensordot(prior, moves, axes=1) - target
    return LeastSquares.of(rest, moves, prior, (basis**2).sum(axis=2).max(axis=1)).fit()
