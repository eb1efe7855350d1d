"""Residual mode: residual differences stand in for velocity deltas.

With x[t, g] all that group g adds at step t, every stream and branch side by side, the stand-in is

    D[t, g, lag] ~ s[t, g] (x[t - lag, g] - x[t, g]).

Directions are those of the residual, not of the velocity, so inner products within one group are
foretold and those between groups are not. The scale s is what makes prices of groups comparable
with one another and with the step unit's: at a few steps each group is replayed once, at lag 1,

    s[t, g] = ||D[t, g, 1]|| / ||x[t - 1, g] - x[t, g]||,

interpolated between them in the logarithm, over sigma. Sketches are linear, so the residual of each
step is sketched once and no raw residual older than one step is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layercache.calibration._replay import ReplayableTransformer
from layercache.calibration._sketch import CountSketch
from layercache.errors import StatsError


class ResidualSketches:
    """Sketches of each step's residuals, of all branches and streams together."""

    def __init__(self, size: int, seed: int, prompts: int) -> None:
        self._size, self._seed, self._prompts = size, seed, prompts
        self._sketches: dict[tuple[int, str, int], CountSketch] = {}
        self._steps: dict[int, NDArray[np.float32]] = {}

    def add(self, replayable: ReplayableTransformer, step: int) -> None:
        """Sketch the residuals that a step has recorded."""
        rows = []
        for group in range(len(replayable.groups)):
            total = torch.zeros(self._prompts, self._size, device=replayable.device)
            for number, residual in replayable.residuals(step, group):
                for name, stream in residual.items():
                    total = total + self._sketch(number, name, stream.to(replayable.device))
            rows.append(total)
        self._steps[step] = torch.stack(rows, dim=1).cpu().numpy()

    def rows(self, steps: int) -> list[NDArray[np.float32]]:
        """(B, G, S) of each step; zeros at steps that this transformer does not make."""
        nothing = np.zeros_like(next(iter(self._steps.values())))
        return [self._steps.get(step, nothing) for step in range(steps)]

    def _sketch(self, number: int, name: str, residual: Tensor) -> Tensor:
        flat = by_prompt(residual, self._prompts)
        # Block lists of one model may differ in how long their streams are.
        key = (number, name, flat.shape[1])
        if key not in self._sketches:
            # A stream of its own for every part: then the sketch of the whole is the parts' sum.
            seed = self._seed + 1 + len(self._sketches)
            self._sketches[key] = CountSketch(flat.shape[1], self._size, seed, exact=False)
        return self._sketches[key](flat)


def by_prompt(tensor: Tensor, prompts: int) -> Tensor:
    """(B, N) rows of a stream whose batch may hold several branches, one after the other.

    Raises:
        StatsError: The stream's length is no multiple of the prompts'.
    """
    if tensor.shape[0] % prompts:
        raise StatsError(
            f"a residual has {tensor.shape[0]} rows for {prompts} prompts: calibrate this model "
            "with batch_size=1"
        )
    stacked = tensor.reshape(tensor.shape[0] // prompts, prompts, -1)
    return stacked.transpose(0, 1).reshape(prompts, -1)


def residual_deltas(
    residuals: Sequence[NDArray[np.float32]],
    norms: NDArray[np.float32],
    scale_steps: Sequence[int],
    sigmas: Sequence[float],
    lags: int,
) -> NDArray[np.float32]:
    """(B, T, G, M, S) stand-ins for velocity deltas.

    Args:
        residuals: For each of T steps, (B, G, S) sketches.
        norms: (B, K, G) norms of the velocity delta at lag 1 at the scale steps.
        scale_steps: The K steps.
        sigmas: (T+1,) noise levels.
        lags: M.
    """
    table = np.stack(residuals, axis=1)  # (B, T, G, S)
    prompts, steps, groups, size = table.shape
    deltas = np.zeros((prompts, steps, groups, lags, size), dtype=np.float32)
    for lag in range(1, min(lags, steps - 1) + 1):
        deltas[:, lag:, :, lag - 1] = table[:, :-lag] - table[:, lag:]
    at = list(scale_steps)
    if not at:
        return deltas
    moved = np.linalg.norm(deltas[:, at][:, :, :, 0].astype(np.float64), axis=-1)
    logs = np.log(np.maximum(norms, 1e-30) / np.maximum(moved, 1e-30))
    # `np.interp` wants rising abscissae; sigmas fall.
    where = np.array([sigmas[step] for step in at])[::-1]
    for prompt in range(prompts):
        for group in range(groups):
            log = np.interp(sigmas[:steps], where, logs[prompt, ::-1, group])
            deltas[prompt, :, group] *= np.exp(log)[:, None, None].astype(np.float32)
    return deltas
