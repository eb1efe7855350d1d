"""Runs whose early velocities are known, and what a changed latent does to the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layercache.calibration.prompts import Batch
from layercache.calibration.replay import ReplayableTransformer
from layercache.models.calling import call_pipeline
from layercache.models.stepping import sigmas_of, tapped_step

PERTURBATION = 0.02
"""Size of the change by which `image_gain` is measured, relative to the latent."""


def run_pipeline(pipe: Any, batch: Batch) -> Tensor:
    """Call the pipeline; images (B, ...) in [0, 1], or latents where nothing can decode them."""
    return call_pipeline(pipe, batch.arguments)


def rerun(
    pipe: Any,
    batch: Batch,
    replayable: ReplayableTransformer,
    velocities: Sequence[Tensor],
    known: int,
    replaced: Mapping[int, Tensor],
) -> tuple[Tensor, Tensor]:
    """Generate again, the first `known` steps from their velocities, which costs no forward.

    Args:
        pipe: The pipeline.
        batch: The prompts of the run that gave `velocities`.
        replayable: The transformer of the pipeline, attached; it has recorded that run.
        velocities: The T guided outputs of the full run.
        known: How many steps are not computed.
        replaced: Velocities to use instead, for some of these steps.

    Returns:
        The images, and the latent after the last step.
    """
    step = number = 0
    final: list[Tensor] = []

    def on_call(*args: Any, **kwargs: Any) -> Any:
        nonlocal number
        branch, number = number, number + 1
        if step < known:
            # What the pipeline makes of it is not used: the scheduler gets a known velocity.
            return replayable.branches[branch].output
        return replayable.run(*args, **kwargs)

    def on_step(index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        nonlocal step, number
        result = velocity
        if index < known:
            result = replaced.get(index, velocities[index]).to(velocity)
        step, number = index + 1, 0
        if step == len(velocities):
            sigmas = sigmas_of(pipe.scheduler)
            final.append((sample + (sigmas[-1] - sigmas[-2]) * result).cpu())
        return result

    replayable.on_call(on_call)
    with tapped_step(pipe.scheduler, on_step):
        images = run_pipeline(pipe, batch)
    return images, final[0]


def image_gain(
    pipe: Any,
    batch: Batch,
    replayable: ReplayableTransformer,
    velocities: Sequence[Tensor],
    final: Tensor,
    images: Tensor,
) -> NDArray[np.float64]:
    """(B,) mean squared pixel change per mean squared change of the final latent.

    The last velocity is nudged by seeded noise so that the latent moves by `PERTURBATION` of its
    size. Without an autoencoder the "image" is the latent, scaled so that its range is 1.

    Args:
        pipe: The pipeline.
        batch: The prompts.
        replayable: The transformer of the pipeline, attached.
        velocities: The T guided outputs of the full run.
        final: Its latent after the last step.
        images: Its images.
    """
    sigmas, last = sigmas_of(pipe.scheduler), len(velocities) - 1
    noise = torch.randn(final.shape, generator=torch.Generator().manual_seed(0))
    nudge = noise.to(final) * (PERTURBATION * final.float().std().item())
    moved = velocities[last] + nudge / abs(sigmas[-1] - sigmas[-2])
    changed, _ = rerun(pipe, batch, replayable, velocities, last + 1, {last: moved})
    change = (images - changed).flatten(1).pow(2).mean(1).double().numpy()
    if images.ndim < 4:
        flat = images.flatten(1)
        span = (flat.max(1).values - flat.min(1).values).double().numpy()
        change = change / np.maximum(span, 1e-12) ** 2
    latent_change = nudge.float().flatten(1).pow(2).mean(1).double().numpy()
    result: NDArray[np.float64] = np.maximum(change / latent_change, 1e-12)
    return result
