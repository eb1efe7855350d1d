"""DPCache-like: the exact schedule of computed steps for a first-order Taylor prediction.

Source: Cui et al., "Denoising as Path Planning: Training-Free Acceleration of Diffusion Models with
DPCache", CVPR 2026, arXiv 2602.22654. The price of going from
key step j to key step k depends on the key step i before j, since the steps between are predicted
from both,

    v̂_t = v_j + w_t (v_j - v_i),   w_t = (x_t - x_j) / (x_j - x_i),

with x the step number or sigma. A dynamic programme over pairs (i, j) finds the exact least total
for every number of key steps.

Deviations, to the method's advantage: it predicts the guided velocity instead of block features, so
that a predicted step costs nothing; an error counts with the length of its Euler step; abscissa and
power are swept.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from layercache.errors import BudgetError
from layercache.evaluation._trajectories import Trajectories
from layercache.evaluation.peers.skipping import skip_steps
from layercache.models.stepping import StepFunction

Abscissa = Literal["step", "sigma"]


def abscissae(sigmas: NDArray[np.float64], kind: Abscissa) -> NDArray[np.float64]:
    """(T,) where the steps lie for the prediction."""
    return sigmas[:-1] if kind == "sigma" else np.arange(len(sigmas) - 1, dtype=np.float64)


def step_errors(trajectories: Trajectories, kind: Abscissa) -> NDArray[np.float64]:
    """(T+1, T, T) error of predicting step t from key steps i < j, weighted by |Δσ_t|.

    Index [i + 1, j, t]; i = -1 stands for no step before j, where v_j is repeated. Entries with
    t <= j or i >= j have no meaning and are 0. Root mean square over elements, mean over prompts.
    """
    v, steps = trajectories.velocities.astype(np.float64), trajectories.num_steps
    x = abscissae(trajectories.sigmas, kind)
    gram = v @ v.transpose(0, 2, 1) / v.shape[2]  # (P, T, T)
    squares = np.einsum("ptt->pt", gram)
    table = np.zeros((steps + 1, steps, steps))
    lengths = np.abs(np.diff(trajectories.sigmas))
    for j in range(steps):
        for i in range(-1, j):
            later = np.arange(j + 1, steps)
            w = (x[later] - x[j]) / (x[j] - x[i]) if i >= 0 else np.zeros(len(later))
            # ‖(1 + w) v_j - w v_i - v_t‖², expanded over inner products
            a, b, base = 1 + w, -w, max(i, 0)
            square = (
                a**2 * squares[:, j, None]
                + b**2 * squares[:, base, None]
                + squares[:, later]
                + 2 * a * b * gram[:, j, base, None]
                - 2 * a * gram[:, j, later]
                - 2 * b * gram[:, base, later]
            )
            table[i + 1, j, later] = np.sqrt(np.maximum(square, 0)).mean(0) * lengths[later]
    return table


def key_steps(errors: NDArray[np.float64], budget: int, power: float = 1.0) -> tuple[int, ...]:
    """The `budget` key steps, step 0 first, with the least Σ error^power over the other steps.

    Args:
        errors: As `step_errors` gives them.
        budget: How many steps are computed.
        power: Above 1 it suppresses peaks.

    Raises:
        BudgetError: `budget` is not between 1 and the number of steps.
    """
    steps = errors.shape[1]
    if not 1 <= budget <= steps:
        raise BudgetError(f"DPCache needs 1 to {steps} computed steps, not {budget}")
    # price[i + 1, j, k]: all steps between j and k, k = T included
    price = np.concatenate(
        [np.zeros((steps + 1, steps, 1)), np.cumsum(errors**power, axis=2)], axis=2
    )
    # State (i + 1, j): the last two key steps.
    best = np.full((steps + 1, steps), np.inf)
    best[0, 0] = 0.0
    origins: list[NDArray[np.intp]] = []
    for _ in range(budget - 1):
        through = best[:, :, None] + price[:, :, :steps]  # (i + 1, j, k)
        through[:, np.arange(steps)[:, None] >= np.arange(steps)[None, :]] = np.inf
        origins.append(through.argmin(axis=0))
        best = np.full((steps + 1, steps), np.inf)
        best[1:] = through.min(axis=0)
    final = best + price[:, :, steps]
    i, j = (int(index) for index in np.unravel_index(int(final.argmin()), final.shape))
    chosen = [j]
    for origin in reversed(origins):
        j, i = i - 1, int(origin[i - 1, j])
        chosen.append(j)
    return tuple(reversed(chosen))


@dataclass(frozen=True)
class DPCache:
    """Key steps, ready to run with first-order prediction in between."""

    keys: tuple[int, ...]
    sigmas: tuple[float, ...]
    abscissa: Abscissa = "step"
    predicted_speedup: float | None = None
    name: str = "dpcache"
    call_changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fresh(self) -> tuple[bool, ...]:
        """(T,) whether the transformer runs."""
        return tuple(step in self.keys for step in range(len(self.sigmas) - 1))

    @property
    def compute_share(self) -> float:
        """Share of steps at which the transformer runs."""
        return len(self.keys) / (len(self.sigmas) - 1)

    def attach(self, pipe: Any) -> AbstractContextManager[None]:
        """Skip the other steps and predict the guided output there."""
        return skip_steps(pipe, self.fresh, self._new_run)

    def _new_run(self) -> StepFunction:
        x = abscissae(np.array(self.sigmas), self.abscissa)
        known: list[tuple[int, Tensor]] = []

        def advance(index: int, velocity: Tensor, sample: Tensor) -> Tensor:
            if index in self.keys:
                known.append((index, velocity))
                del known[:-2]
                return velocity
            if len(known) < 2:
                return velocity
            (i, older), (j, newer) = known
            weight = float((x[index] - x[j]) / (x[j] - x[i]))
            return newer + weight * (newer - older)

        return advance
