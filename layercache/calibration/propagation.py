"""How much an error made at one step has grown when it reaches the final latent.

At a few probe steps t the velocity is replaced by that of the step before, as plain reuse would
do, and the run goes on at full compute. With delta = v_{t-1} - v_t and z the final latent,

    amplification(t) = ||z_perturbed - z|| / ||(sigma_{t+1} - sigma_t) delta||,

interpolated between probes in the logarithm, over sigma. The steps before t are not computed again:
their velocities are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from layercache.calibration.profile import rerun
from layercache.calibration.prompts import Batch
from layercache.calibration.replay import ReplayableTransformer
from layercache.models.stepping import sigmas_of

PROBES = 6


def probe_steps(sigmas: Sequence[float], count: int = PROBES) -> tuple[int, ...]:
    """Steps to probe: denser towards the noise, where errors grow most.

    Example:
        >>> probe_steps([1 - i / 50 for i in range(51)])
        (1, 4, 9, 16, 28, 48)
    """
    last = len(sigmas) - 3
    if last < 1 or count < 1:
        return ()
    spaced = np.geomspace(1, last + 1, count) - 1
    # Halfway between geometric and even spacing: early steps matter most, late ones anchor the end.
    even = np.linspace(0, last, count)
    return tuple(sorted({int(s) for s in 1 + np.minimum(last - 1, (spaced + even / 2) / 1.5)}))


def measure_amplification(
    pipe: Any,
    batch: Batch,
    replayable: ReplayableTransformer,
    velocities: Sequence[Tensor],
    final: Tensor,
    count: int = PROBES,
) -> NDArray[np.float64]:
    """(B, T) amplification of each prompt at each step; all 1 without probes.

    Args:
        pipe: The pipeline.
        batch: The prompts of the run that gave `velocities` and `final`.
        replayable: The transformer of the pipeline, attached.
        velocities: The T guided outputs of the full run.
        final: Its latent after the last step.
        count: How many steps are probed.
    """
    sigmas = sigmas_of(pipe.scheduler)
    steps = len(velocities)
    probes = probe_steps(sigmas, count)
    if not probes:
        return np.ones((len(batch.ids), steps))
    logs = []
    for probe in probes:
        reused = {probe: velocities[probe - 1]}
        _, reached = rerun(pipe, batch, replayable, velocities, probe + 1, reused)
        made = (sigmas[probe + 1] - sigmas[probe]) * (velocities[probe - 1] - velocities[probe])
        logs.append(np.log(_growth(reached - final, made)))
    # `np.interp` wants rising abscissae; sigmas fall.
    at = np.array([sigmas[probe] for probe in probes])[::-1]
    values = np.array(logs)[::-1]
    table = [np.interp(sigmas[:steps], at, values[:, row]) for row in range(values.shape[1])]
    result: NDArray[np.float64] = np.exp(np.array(table))
    return result


def _growth(reached: Tensor, made: Tensor) -> NDArray[np.float64]:
    """(B,) ratio of norms."""
    grown = reached.flatten(1).double().norm(dim=1).numpy()
    size = made.flatten(1).double().norm(dim=1).numpy()
    # Reuse that changes nothing says nothing about growth; so does a dead prompt.
    ratio = np.where(size > 0, grown / np.where(size > 0, size, 1.0), 1.0)
    return np.clip(ratio, 1e-3, 1e6)
