"""A non-stationary solver: a free linear multistep method, fitted to a model's own trajectories.

Source: Shaul et al., "Bespoke Non-Stationary Solvers for Fast Sampling of Diffusion and Flow
Models", ICML 2024, arXiv 2403.01329. With nodes t_0 = 0 < t_1 < ... < t_{N-1} at which the model is
computed, the state at the next node is any linear combination of the noise and of all velocities so
far,

    x_{i+1} = a_i x_0 + Σ_{j <= i} b_ij v_j,

which holds every multistep, exponential and Taylor method on these nodes as a special case. No
step-level cache that predicts linearly can represent more.

Deviation: the paper trains nodes and coefficients by gradients through the model, for some thousand
steps on hundreds of image pairs. Here nodes come from a search on the recorded trajectories
(`nodes`), and coefficients from ridge least squares, row by row and in closed loop: the solver runs
on all calibration prompts at once, row i is fitted to the true state at t_{i+1} from the velocities
that the solver itself has met, and the run goes on from the state that the row gives. Errors made
before are thus seen, and paid back, by later rows. The ridge pulls towards the second-order step of
Adams and Bashforth and is chosen by leaving one prompt out; prompts are weighted by the inverse of
their squared error, so that the fit minimises the mean of decibels, as the paper's loss does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layercache.calibration.prompts import Batch
from layercache.evaluation._trajectories import Trajectories
from layercache.evaluation.peers.skipping import skip_steps
from layercache.models.pipelines import run_pipeline
from layercache.models.stepping import StepFunction
from layercache.prediction.ridge import fit_row

Array = NDArray[np.float64]


@dataclass(frozen=True)
class NonStationary:
    """Nodes and coefficients, ready to run.

    Attributes:
        nodes: The N steps at which the model is computed, 0 first.
        rows: Row i holds a_i, b_i0, ..., b_ii.
        sigmas: The T+1 noise levels of the uncached run, of which the nodes are a part.
    """

    nodes: tuple[int, ...]
    rows: tuple[tuple[float, ...], ...]
    sigmas: tuple[float, ...]
    predicted_speedup: float | None = None
    name: str = "non-stationary"
    call_changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fresh(self) -> tuple[bool, ...]:
        """(T,) whether the transformer runs."""
        return tuple(step in self.nodes for step in range(len(self.sigmas) - 1))

    @property
    def compute_share(self) -> float:
        """Share of steps at which the transformer runs."""
        return len(self.nodes) / (len(self.sigmas) - 1)

    def attach(self, pipe: Any) -> AbstractContextManager[None]:
        """Walk from node to node."""
        return skip_steps(pipe, self.fresh, lambda: _walk(self.nodes, self.sigmas, self._row))

    def _row(self, basis: Sequence[Tensor]) -> Sequence[float]:
        return self.rows[len(basis) - 2]


def fit_nonstationary(
    pipe: Any, batch: Batch, trajectories: Trajectories, nodes: Sequence[int]
) -> NonStationary:
    """Fit the coefficients for given nodes; costs one generation of `batch` under the solver.

    Args:
        pipe: The pipeline.
        batch: Calibration prompts, all in one call.
        trajectories: Full-compute runs of the same prompts in the same order.
        nodes: Steps at which the model is computed, 0 first.
    """
    nodes, sigmas = tuple(nodes), trajectories.sigmas
    stops = (*nodes[1:], trajectories.num_steps)
    rows: list[tuple[float, ...]] = []

    def row(basis: Sequence[Tensor]) -> Sequence[float]:
        stack = np.stack([b.flatten(1).double().cpu().numpy() for b in basis], axis=1)
        i = len(basis) - 2
        target = trajectories.latents[:, stops[i]].astype(np.float64)
        prior = default_row(rows[-1] if rows else None, nodes, stops[i], sigmas)
        if i == 0 and stops[0] == 1:
            rows.append(tuple(prior.tolist()))  # one Euler step is exact
        else:
            rows.append(tuple(fit_row(stack, target, prior).tolist()))
        return rows[-1]

    fresh = [step in nodes for step in range(trajectories.num_steps)]
    levels = tuple(float(sigma) for sigma in sigmas)
    with torch.no_grad(), skip_steps(pipe, fresh, lambda: _walk(nodes, levels, row)):
        run_pipeline(pipe, batch.arguments)
    return NonStationary(nodes, tuple(rows), levels)


def default_row(
    before: Sequence[float] | None, nodes: Sequence[int], stop: int, sigmas: Array
) -> Array:
    """What a row is without a fit: the row before, then an Adams-Bashforth step of order 2.

    Order 1 at the first node. `before` is None there.
    """
    i = 0 if before is None else len(before) - 1
    if i == 0:
        return np.array([1.0, sigmas[stop] - sigmas[0]])
    result = np.array([*(before or ()), 0.0])
    older, newer = sigmas[nodes[i - 1]], sigmas[nodes[i]]
    length = sigmas[stop] - newer
    slope = 0.5 * length / (newer - older)
    result[-1] += length * (1 + slope)
    result[-2] -= length * slope
    return result


def _walk(nodes: Sequence[int], sigmas: Sequence[float], row_of: Any) -> StepFunction:
    """The step function that a list of coefficients stands for.

    `row_of` receives noise and velocities so far and returns their coefficients. Between two nodes
    the scheduler takes Euler steps of the mean velocity that leads to the state wanted.
    """
    basis: list[Tensor] = []
    mean: Tensor | None = None
    stops = dict(zip(nodes, (*nodes[1:], len(sigmas) - 1), strict=True))

    def advance(index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        nonlocal mean
        if index in stops:
            if not basis:
                basis.append(sample.clone())
            basis.append(velocity.clone())
            wanted = sum(
                (c * b.double() for c, b in zip(row_of(basis), basis, strict=True)),
                torch.zeros_like(sample, dtype=torch.float64),
            )
            span = sigmas[stops[index]] - sigmas[index]
            mean = ((wanted - sample.double()) / span).to(velocity.dtype)
        assert mean is not None
        return mean

    return advance
