"""How much an error made at one step has grown when it reaches the final latent.

At a few probe steps t the latent is moved as if the velocity were that of the step before, as plain
reuse would do, and the run goes on at full compute. With delta = v_{t-1} - v_t and z the final
latent,

    amplification(t) = ||z_perturbed - z|| / ||(sigma_{t+1} - sigma_t) delta||,

interpolated between probes in the logarithm, over sigma. The steps before t are not computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from layercache.calibration._record import Run
from layercache.calibration._reenact import Reenactment
from layercache.calibration._stage import Others, Stage
from layercache.calibration.prompts import Batch

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
    stage: Stage,
    batch: Batch,
    run: Run,
    others: Others,
    count: int = PROBES,
    on_step: Callable[[int], None] = lambda step: None,
) -> NDArray[np.float64]:
    """(B, T) amplification of each prompt at each step; all 1 without probes.

    Args:
        stage: The pipeline.
        batch: The prompts.
        run: Their recorded run.
        others: What the pipeline's other models do at steps that are not computed again.
        count: How many steps are probed.
        on_step: Called with each step that was computed again.
    """

    def perturbed(probe: int, change: Tensor) -> Tensor:
        stop = run.first[probe + 1]

        def told(step: int, velocity: Tensor) -> None:
            if step >= stop and step in run.first:
                on_step(step)

        director = Reenactment(run, changed={stop - 1: change}, known=stop, on_velocity=told)
        stage.play(batch, director, others)
        assert director.final is not None
        return director.final

    return growth_table(run, count, perturbed)


def growth_table(
    run: Run, count: int, perturbed: Callable[[int, Tensor], Tensor]
) -> NDArray[np.float64]:
    """(B, T) amplification of a recorded run; `perturbed` gives its final latent if it is changed.

    Args:
        run: The recorded run.
        count: How many steps are probed.
        perturbed: The final latent of the run that is moved by a change after a step.
    """
    sigmas, first = run.levels, run.first
    probes = probe_steps(sigmas, count)
    if not probes:
        return np.ones((len(run.final), len(first)))
    logs = []
    for probe in probes:
        change = run.velocity(first[probe - 1]) - run.velocity(first[probe])
        made = (sigmas[probe + 1] - sigmas[probe]) * change
        reached = perturbed(probe, made)
        logs.append(np.log(_growth((reached - run.final).float() * run.mask, made)))
    # `np.interp` wants rising abscissae; sigmas fall.
    at = np.array([sigmas[probe] for probe in probes])[::-1]
    values = np.array(logs)[::-1]
    table = [np.interp(sigmas[:-1], at, values[:, row]) for row in range(values.shape[1])]
    result: NDArray[np.float64] = np.exp(np.array(table))
    return result


def _growth(reached: Tensor, made: Tensor) -> NDArray[np.float64]:
    """(B,) ratio of norms."""
    grown = reached.flatten(1).double().norm(dim=1).numpy()
    size = made.flatten(1).double().norm(dim=1).numpy()
    # Reuse that changes nothing says nothing about growth; so does a dead prompt.
    ratio = np.where(size > 0, grown / np.where(size > 0, size, 1.0), 1.0)
    return np.clip(ratio, 1e-3, 1e6)
