"""Full-compute trajectories of calibration prompts: what whole-step methods are fitted on.

Shape suffixes: P prompts, T steps, N elements of a latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layercache.calibration.prompts import Batch
from layercache.models.pipelines import run_pipeline
from layercache.models.stepping import sigmas_of, tapped_step


@dataclass(frozen=True, eq=False)
class Trajectories:
    """Latents and guided velocities of uncached runs.

    Attributes:
        sigmas: (T+1,) noise levels.
        latents: (P, T+1, N) float32, z_t before each step and, last, the final latent.
        velocities: (P, T, N) float32, the guided output that each step received.
    """

    sigmas: NDArray[np.float64]
    latents: NDArray[np.float32]
    velocities: NDArray[np.float32]

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.sigmas) - 1


def collect_trajectories(pipe: Any, batches: Sequence[Batch]) -> Trajectories:
    """Run the batches uncached and keep every latent and velocity, on the CPU.

    The final latent is the Euler step from the last one: z_T = z_{T-1} + (σ_T - σ_{T-1}) v_{T-1}.
    """
    latents, velocities = [], []
    for batch in batches:
        z: list[Tensor] = []
        v: list[Tensor] = []

        def record(index: int, velocity: Tensor, sample: Tensor, z=z, v=v) -> Tensor:  # type: ignore[no-untyped-def]
            z.append(sample.detach().float().cpu().flatten(1))
            v.append(velocity.detach().float().cpu().flatten(1))
            return velocity

        with torch.no_grad(), tapped_step(pipe.scheduler, record):
            run_pipeline(pipe, batch.arguments)
        sigmas = sigmas_of(pipe.scheduler)
        z.append(z[-1] + (sigmas[-1] - sigmas[-2]) * v[-1])
        latents.append(torch.stack(z, dim=1).numpy())
        velocities.append(torch.stack(v, dim=1).numpy())
    return Trajectories(
        sigmas=np.array(sigmas),
        latents=np.concatenate(latents),
        velocities=np.concatenate(velocities),
    )
