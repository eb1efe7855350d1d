"""LeMiCa-like: the schedule whose worst reused stretch does the least harm to the final output.

Source: Gao et al., "LeMiCa: Lexicographic Minimax Path Caching for Efficient Diffusion-Based Video
Generation", NeurIPS 2025, arXiv 2511.00090. Edges of a graph over steps are reused stretches,
weighed by the error that each alone makes in the final output; the path with at most B edges is
chosen whose largest weight is least, and among those the one with the least sum.

Deviations: the paper runs every edge to the end. Here the displacement that an edge makes is
measured on full-compute trajectories, and its growth until the end by runs from a few probe steps
(`calibration.propagation`), so that an edge's weight is displacement times growth. The guided
velocity is reused instead of the blocks' residual, which makes a reused step free.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from layercache.errors import BudgetError
from layercache.evaluation._trajectories import Trajectories


def final_errors(
    trajectories: Trajectories, amplification: NDArray[np.floating]
) -> NDArray[np.float64]:
    """(T, T+1) final-output error of computing step t and reusing its velocity until step s.

    Args:
        trajectories: Full-compute runs of P prompts.
        amplification: (P, T) growth of an error made at a step, or (T,) for all prompts.

    Returns:
        Root mean square over elements, geometric mean over prompts (one prompt can amplify a
        hundredfold); infinite where s <= t.
    """
    z, v, sigmas = trajectories.latents, trajectories.velocities, trajectories.sigmas
    steps = trajectories.num_steps
    costs = np.full((steps, steps + 1), np.inf)
    growth = np.log(np.broadcast_to(amplification, (len(z), steps)).astype(np.float64)).mean(0)
    for t in range(steps):
        span = (sigmas[t + 1 :] - sigmas[t])[None, :, None]
        error = span * v[:, t, None].astype(np.float64) - (z[:, t + 1 :] - z[:, t, None])
        size = np.sqrt((error**2).mean(-1))
        # An error made over steps t..s-1 grows as one made halfway.
        middle = (t + np.arange(t + 1, steps + 1) - 1) / 2
        carried = np.exp(np.interp(middle, np.arange(steps), growth))
        costs[t, t + 1 :] = np.exp(np.log(np.maximum(size, 1e-12)).mean(0)) * carried
        costs[t, t + 1] = 0.0
    return costs


def minimax_steps(costs: NDArray[np.float64], budget: int) -> tuple[bool, ...]:
    """(T,) which steps to compute: least largest edge, then least sum, over at most `budget` edges.

    Raises:
        BudgetError: `budget` is less than 1.
    """
    steps = costs.shape[0]
    if budget < 1:
        raise BudgetError(f"LeMiCa needs at least 1 computed step of {steps}, not {budget}")
    largest = np.full(steps + 1, np.inf)
    largest[0] = 0.0
    best = np.inf
    for _ in range(min(budget, steps)):
        largest = np.maximum(largest[:-1, None], costs).min(axis=0)
        best = min(best, float(largest[steps]))
    allowed = np.where(costs <= best, costs, np.inf)
    total = np.full(steps + 1, np.inf)
    total[0] = 0.0
    totals, origins = [total], []
    for _ in range(min(budget, steps)):
        through = total[:-1, None] + allowed
        origins.append(through.argmin(axis=0))
        total = through.min(axis=0)
        totals.append(total)
    stop, fresh = steps, [False] * steps
    for taken in range(int(np.argmin([row[steps] for row in totals])), 0, -1):
        stop = int(origins[taken - 1][stop])
        fresh[stop] = True
    return tuple(fresh)
