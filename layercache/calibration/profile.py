"""What a step's time is spent on, and what a change of the final latent does to the image."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layercache.calibration.prompts import Batch
from layercache.calibration.replay import ReplayableTransformer
from layercache.models.stepping import tapped_step

PERTURBATION = 0.02
"""Size of the change by which `image_gain` is measured, relative to the latent."""


@dataclass(frozen=True)
class Profile:
    """Times of a plain run, and the images of that run with its last step perturbed.

    Attributes:
        times_ms: (G+2,) as in `CalibrationStats.times_ms`.
        images: The pipeline's images, (B, ...) in [0, 1], or latents without an autoencoder.
        latent_change: (B,) mean squared change of the final latent that the perturbation made.
    """

    times_ms: NDArray[np.float64]
    images: Tensor
    latent_change: NDArray[np.float64]


def profile_run(pipe: Any, batch: Batch, replayable: ReplayableTransformer) -> Profile:
    """Generate once with timers on, nudging the velocity of the last step by seeded noise."""
    calls: list[float] = []
    number = 0
    began = ended = 0.0
    change: NDArray[np.float64] = np.zeros(0)
    for times in (*replayable.group_seconds, replayable.call_seconds):
        times.clear()

    def on_call(*args: Any, **kwargs: Any) -> Any:
        nonlocal number, began
        if not calls and number == 0:
            began = time.perf_counter()
        output = replayable.record(number, args, kwargs)
        number += 1
        return output

    def on_step(index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        nonlocal number, ended, change
        calls.append(sum(replayable.call_seconds[-number:]))
        number = 0
        ended = time.perf_counter()
        sigmas = pipe.scheduler.sigmas
        if index < len(sigmas) - 2:
            return velocity
        step = abs(float(sigmas[index + 1] - sigmas[index]))
        noise = torch.randn(velocity.shape, generator=torch.Generator().manual_seed(0))
        nudge = noise.to(velocity) * (PERTURBATION * sample.float().std().item())
        squares = nudge.float().flatten(1).pow(2).mean(1)
        change = squares.double().cpu().numpy()
        return velocity + nudge / step

    replayable.on_call(on_call)
    with tapped_step(pipe.scheduler, on_step):
        images = run_pipeline(pipe, batch)
    steps = len(calls)
    branches = len(replayable.call_seconds) // steps
    warm = slice(min(2, steps - 1), None)
    groups = [
        1e3 * float(np.median(np.reshape(times, (steps, branches)).sum(1)[warm]))
        for times in replayable.group_seconds
    ]
    call = 1e3 * float(np.median(np.array(calls)[warm]))
    # The last step's own scheduler work falls outside this window; a run has at least one step.
    outside = 1e3 * max(0.0, ended - began - sum(calls)) / steps
    times_ms = np.array([*groups, max(0.0, call - sum(groups)), outside])
    return Profile(times_ms, images, change)


def run_pipeline(pipe: Any, batch: Batch) -> Tensor:
    """Call the pipeline; images (B, ...) in [0, 1], or latents where nothing can decode them."""
    arguments = dict(batch.arguments)
    # Every run of a batch starts from the same noise: generators are stateful, so copy them.
    generators = arguments.get("generator")
    if isinstance(generators, list):
        arguments["generator"] = [g.clone_state() for g in generators]
    elif isinstance(generators, torch.Generator):
        arguments["generator"] = generators.clone_state()
    decodes = getattr(pipe, "vae", None) is not None
    arguments["output_type"] = "pt" if decodes else "latent"
    arguments["return_dict"] = False
    output = pipe(**arguments)[0]
    tensor = output if isinstance(output, Tensor) else torch.stack(list(output))
    return tensor.detach().float().cpu()


def image_gain(images: Tensor, profile: Profile) -> NDArray[np.float64]:
    """(B,) mean squared pixel change per mean squared change of the final latent.

    Without an autoencoder the "image" is the latent, scaled so that its range is 1.
    """
    change = (images - profile.images).flatten(1).pow(2).mean(1).double().numpy()
    flat = images.flatten(1)
    if images.ndim < 4:
        span = (flat.max(1).values - flat.min(1).values).double().numpy()
        change = change / np.maximum(span, 1e-12) ** 2
    result: NDArray[np.float64] = np.maximum(change / profile.latent_change, 1e-12)
    return result
