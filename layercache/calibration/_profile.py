"""What a changed latent does to the image."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layercache.calibration._record import Run
from layercache.calibration._reenact import Reenactment
from layercache.calibration._stage import Others, Stage
from layercache.calibration.prompts import Batch
from layercache.models.pipelines import decodes

PERTURBATION = 0.02
"""Size of the change by which `image_gain` is measured, relative to the latent."""


def image_gain(
    stage: Stage, batch: Batch, run: Run, others: Others, images: Tensor
) -> NDArray[np.float64]:
    """(B,) mean squared pixel change per mean squared change of the final latent.

    The final latent is changed twice, by `PERTURBATION` of its size where it is the model's to
    move: by seeded noise, and as plain reuse at the last step would change it. A decoder answers to
    one direction more than to another, and may average noise out, so the larger gain of each prompt
    counts. Without an autoencoder the "image" is the latent, scaled to a range of 1.

    Args:
        stage: The pipeline.
        batch: The prompts.
        run: Their recorded run.
        others: What the pipeline's other models do.
        images: Its images.
    """
    size = PERTURBATION * run.final.float().std().item()
    span = np.ones(len(images))
    if not decodes(stage.pipe):
        flat = images.flatten(1)
        span = (flat.max(1).values - flat.min(1).values).double().numpy()
    gains = []
    for direction in _directions(run):
        nudge = direction * size * run.mask
        director = Reenactment(run, changed={run.steps - 1: -nudge}, ends=False)
        changed = stage.play(batch, director, others)
        assert changed is not None
        change = (images - changed).flatten(1).pow(2).mean(1).double().numpy()
        latent_change = nudge.flatten(1).pow(2).mean(1).double().numpy()
        gains.append(change / np.maximum(span, 1e-12) ** 2 / latent_change)
    result: NDArray[np.float64] = np.maximum(np.max(gains, axis=0), 1e-12)
    return result


def _directions(run: Run) -> list[Tensor]:
    """(B, ...) what changes the final latents, of mean square 1 for each prompt."""
    noise = torch.randn(run.final.shape, generator=torch.Generator().manual_seed(0))
    if len(run.first) < 2:
        return [noise]
    change = run.velocity(run.first[-2]) - run.velocity(run.first[-1])
    size = change.flatten(1).pow(2).mean(1).sqrt().view(-1, *[1] * (change.ndim - 1))
    return [noise, torch.where(size > 0, change / size.clamp_min(1e-30), noise)]
