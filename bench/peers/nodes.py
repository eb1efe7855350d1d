"""Nodes for the non-stationary solver: hill climbing on recorded trajectories.

The paper trains nodes together with coefficients, by gradients. Here a set of nodes is judged by
how well each stretch x_{t_{i+1}} - x_{t_i} is fitted, over all calibration prompts, by the noise
and the last four velocities; a stretch of one step is exact. The error of a stretch counts with the
growth that errors made there have until the end. Everything is an inner product of recorded
vectors, so a set is judged in about a millisecond.

Shape suffixes: P prompts, T steps, I nodes, K features of a fit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from layercache.evaluation._trajectories import Trajectories

Array = NDArray[np.float64]

_HISTORY = 4
_RIDGE = 1e-7
_REACH = 2
_TINY = 1e-14


class NodeSearch:
    """Judges and improves sets of nodes.

    Args:
        trajectories: Full-compute runs of calibration prompts.
        growth: (T,) how much an error made at a step has grown by the end.
    """

    def __init__(self, trajectories: Trajectories, growth: Array) -> None:
        start, v = trajectories.latents[:, :1], trajectories.velocities
        basis = np.concatenate([start, v], axis=1).astype(np.float64)
        self.gram = basis @ basis.transpose(0, 2, 1) / basis.shape[2]  # (P, T+1, T+1)
        steps = trajectories.num_steps
        # states[t]: z_t over the basis of noise and velocities
        self.states = np.zeros((steps + 1, steps + 1))
        self.states[:, 0] = 1.0
        lengths = np.diff(trajectories.sigmas)
        for t in range(1, steps + 1):
            self.states[t, 1 : t + 1] = lengths[:t]
        self.steps, self.growth = steps, np.asarray(growth, dtype=np.float64)

    def score(self, nodes: Sequence[int]) -> float:
        """Mean over prompts of the log of the summed squared errors; lower is better."""
        errors = self._stretch_errors(np.asarray(nodes))
        total = (errors * self.growth[list(nodes)] ** 2).sum(axis=1)
        return float(np.log(total + _TINY).mean())

    def climb(self, nodes: Sequence[int]) -> tuple[int, ...]:
        """Move one node at a time, by up to two steps, while that lowers the score."""
        current, best = list(nodes), self.score(nodes)
        improved = True
        while improved:
            improved = False
            for place in range(1, len(current)):
                for moved in self._moves(current, place):
                    score = self.score(moved)
                    if score < best - 1e-9:
                        current, best, improved = moved, score, True
                        break
        return tuple(current)

    def best(self, starts: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """The best end of climbs from several starts."""
        return min((self.climb(start) for start in starts), key=self.score)

    def _moves(self, nodes: list[int], place: int) -> list[list[int]]:
        node = nodes[place]
        others = nodes[:place] + nodes[place + 1 :]
        near = range(max(1, node - _REACH), min(self.steps, node + _REACH + 1))
        return [sorted([*others, step]) for step in near if step not in nodes]

    def _stretch_errors(self, nodes: NDArray[np.int_]) -> Array:
        """(P, I) mean squared error of each stretch under the common fit."""
        stops = np.append(nodes[1:], self.steps)
        count, prompts = len(nodes), len(self.gram)
        # Before the fourth node the first one is repeated; the ridge settles what that leaves open.
        history = np.maximum(np.arange(count)[:, None] - np.arange(_HISTORY)[None], 0)
        features = np.concatenate([np.zeros((count, 1), dtype=int), 1 + nodes[history]], axis=1)
        target = self.states[stops] - self.states[nodes]
        gram = self.gram[:, features[:, :, None], features[:, None, :]]  # (P, I, K, K)
        against = np.einsum("pab,ib->pia", self.gram, target)
        right = np.take_along_axis(
            against, np.broadcast_to(features, (prompts, *features.shape)), 2
        )
        square = np.einsum("pia,ia->pi", against, target)
        weights = np.full((prompts, count), 1 / prompts)
        errors = square
        for _ in range(2):  # the second time, prompts count by the inverse of their error
            normal = np.einsum("pi,pikl->ikl", weights, gram)
            scale = np.sqrt(np.maximum(np.einsum("ikk->ik", normal), 1e-300))
            normal = normal / scale[:, :, None] / scale[:, None, :] + _RIDGE * np.eye(len(scale[0]))
            wanted = np.einsum("pi,pik->ik", weights, right) / scale
            fit = np.linalg.solve(normal, wanted[..., None])[..., 0] / scale
            explained = 2 * np.einsum("pik,ik->pi", right, fit)
            explained -= np.einsum("ik,pikl,il->pi", fit, gram, fit)
            errors = np.maximum(square - explained, _TINY)
            weights = 1 / errors
            weights = np.minimum(weights, 100 * np.exp(np.log(weights).mean(axis=0)))
            weights /= weights.sum(axis=0)
        result: Array = np.where(stops == nodes + 1, 0.0, errors)
        return result
