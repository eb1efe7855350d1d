"""Every supported model, calibrated. Oracle: the runtime, with one cell of a plan cached."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from layercache.calibration import calibrate
from layercache.models.stepping import sigmas_of, tapped_step
from layercache.runtime import apply_plan
from layercache.stats import CalibrationStats
from tests.models.zoo import BUILDERS, build
from tests.runtime.harness import LoopPipeline, group, make_plan

STEPS = 4


class Loop(LoopPipeline):
    """The harness's pipeline with the arguments and the output of diffusers' own."""

    def __call__(self, num_inference_steps: int = STEPS, **_: Any) -> Any:  # type: ignore[override]
        with torch.no_grad():
            self.scheduler.set_timesteps(num_inference_steps)
            sigmas = sigmas_of(self.scheduler)
            latent: Tensor | None = None
            for t in self.scheduler.timesteps:
                index = self.scheduler.step_index or 0
                velocity = self.velocity(sigmas[index], latent)[None]
                if latent is None:
                    latent = torch.linspace(-1.0, 2.0, velocity.numel())[None]
                latent = self.scheduler.step(velocity, t, latent, return_dict=False)[0]
        return (latent,)


def measured(name: str, **options: Any) -> CalibrationStats:
    return calibrate(
        Loop(*build(name)),
        [{}],
        num_inference_steps=STEPS,
        lags=2,
        sketch_size=1 << 20,
        probes=0,
        progress=False,
        **options,
    )


def with_one_cell_cached(name: str, stats: CalibrationStats, index: int, step: int) -> np.ndarray:
    """The velocity at `step` if one group reuses there what it had the step before."""
    pipe, seen = Loop(*build(name)), []

    def see(at: int, velocity: Tensor, sample: Tensor) -> Tensor:
        seen.append(velocity)
        return velocity

    cells = "".join("0" if t == step else "#" for t in range(STEPS))
    unit = stats.groups[index]
    plan = make_plan(pipe, STEPS, [group(unit.block_list, unit.start, unit.stop, cells)])
    with tapped_step(pipe.scheduler, see), apply_plan(pipe, plan) as run:
        pipe()
    assert run.report().warnings == ()
    found: np.ndarray = seen[step][0].numpy()
    return found


@pytest.mark.parametrize("name", BUILDERS)
def test_deltas_are_what_the_runtime_does_to_the_velocity(name: str) -> None:
    stats = measured(name, groups="blocks")
    step = STEPS - 1
    scale = np.abs(stats.velocities[0, step]).max()
    for index in range(0, stats.num_groups, 2):
        expected = with_one_cell_cached(name, stats, index, step) - stats.velocities[0, step]
        assert np.abs(expected).max() > 1e-5 * scale
        np.testing.assert_allclose(
            stats.deltas[0, step, index, 0], expected, atol=2e-6 * scale, rtol=1e-3
        )


@pytest.mark.parametrize("name", BUILDERS)
def test_residual_mode_runs_and_scales_to_the_same_size(name: str) -> None:
    replay, residual = measured(name), measured(name, mode="residual")
    np.testing.assert_array_equal(replay.velocities, residual.velocities)
    found, exact = (np.linalg.norm(s.deltas[0, 1:, :, 0], axis=-1) for s in (residual, replay))
    np.testing.assert_allclose(found, exact, rtol=1e-2)
