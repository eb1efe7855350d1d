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

    The final latent is changed by seeded noise of `PERTURBATION` of its size, where it is the
    model's to move. Without an autoencoder the "image" is the latent, scaled to a range of 1.

    Args:
        stage: The pipeline.
        batch: The prompts.
        run: Their recorded run.
        others: What the pipeline's other models do.
        images: Its images.
    """
    final = run.final.float()
    noise = torch.randn(final.shape, generator=torch.Generator().manual_seed(0))
    nudge = noise * (PERTURBATION * final.std().item()) * run.mask
    director = Reenactment(run, changed={run.steps - 1: -nudge}, ends=False)
    changed = stage.play(batch, director, others)
    assert changed is not None
    change = (images - changed).flatten(1).pow(2).mean(1).double().numpy()
    if not decodes(stage.pipe):
        flat = images.flatten(1)
        span = (flat.max(1).values - flat.min(1).values).double().numpy()
        change = change / np.maximum(span, 1e-12) ** 2
    latent_change = nudge.flatten(1).pow(2).mean(1).double().numpy()
    result: NDArray[np.float64] = np.maximum(change / latent_change, 1e-12)
    return result
