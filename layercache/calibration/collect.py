"""One calibration run: full compute, with velocities, velocity deltas and times on the way.

Guidance is whatever the pipeline makes of the transformer's outputs, and only the pipeline knows
it. To price a replaced group in the *guided* output, a timestep with n replays is therefore handed
to the pipeline 1 + n times: first the model computes and is recorded, then the same transformer
calls are answered by replays, one (group, lag) after another, and the pipeline applies its guidance
to each. The scheduler moves once, after the last, with the velocity of the first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layercache.calibration.jobs import Jobs
from layercache.calibration.profile import image_gain, run_pipeline
from layercache.calibration.prompts import Batch
from layercache.calibration.propagation import measure_amplification
from layercache.calibration.replay import ReplayableTransformer
from layercache.calibration.residual import ResidualSketches, residual_deltas
from layercache.calibration.sketch import CountSketch
from layercache.errors import StatsError
from layercache.models.stepping import sigmas_of, tapped_step

Tick = Callable[[], None]


@dataclass(frozen=True)
class Measured:
    """What one batch gave; arrays as in `CalibrationStats`, B prompts long."""

    sigmas: tuple[float, ...]
    velocities: NDArray[np.float32]
    latents: NDArray[np.float32]
    deltas: NDArray[np.float32]
    times_ms: NDArray[np.float64]
    image_gain: NDArray[np.float64]
    amplification: NDArray[np.float64]
    group_bytes: tuple[int, ...]
    velocity_bytes: int
    output_bytes: int
    numel: int
    branches: int


class _Collector:
    """Drives the replays from the pipeline's own calls of the transformer and the scheduler."""

    def __init__(
        self,
        scheduler: Any,
        replayable: ReplayableTransformer,
        jobs: Jobs,
        lags_together: int,
        sketch_size: int,
        sketch_seed: int,
        prompts: int,
        tick: Tick,
    ) -> None:
        self.scheduler, self.replayable, self.jobs = scheduler, replayable, jobs
        self.lags_together, self.prompts, self.tick = lags_together, prompts, tick
        self.sketch_size, self.sketch_seed = sketch_size, sketch_seed
        self.position = -1  # -1 records; then one position a job
        self.number = 0
        self.velocity: Tensor | None = None
        self.velocities: list[Tensor] = []
        self.final: Tensor | None = None
        self.row: list[Tensor] = []
        self.outputs: dict[tuple[int, int, int], Any] = {}
        self.batched: bool | None = None
        self.velocity_bytes = 0
        self.group_bytes: tuple[int, ...] = ()
        self.began: Any = None
        self.returned: Any = None

    # -- the transformer's calls ---------------------------------------------------------------

    def on_call(self, *args: Any, **kwargs: Any) -> Any:
        number, self.number = self.number, self.number + 1
        if self.position < 0:
            if number == 0:
                self.began = self.replayable.times.clock.mark()
                if self.returned is not None:
                    self.replayable.times.outside(self.returned, self.began)
            return self.replayable.record(number, args, kwargs)
        group, lag = self.jobs.at(self.step)[self.position]
        if lag > self.step:
            return self.replayable.branches[number].output
        if (number, group, lag) not in self.outputs:
            self._replay(number, group, lag)
        return self.outputs.pop((number, group, lag))

    def _replay(self, number: int, group: int, first: int) -> None:
        lags = [lag for g, lag in self.jobs.at(self.step) if g == group and lag >= first]
        together = min(len(lags), self.lags_together)
        if together > 1 and self.batched is None:
            self.batched = self.replayable.batches_repeat(number)
        chunk = lags[: together if self.batched else 1]
        results = self.replayable.replay(number, group, chunk)
        for lag, output in zip(chunk, results, strict=True):
            self.outputs[number, group, lag] = output

    # -- the scheduler's calls -----------------------------------------------------------------

    @property
    def step(self) -> int:
        return len(self.velocities)

    def on_step(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor | None:
        self.number = 0
        if index != self.step:
            raise StatsError(
                f"the scheduler is at step {index} where step {self.step} was expected; "
                "calibration needs a plain text-to-image run of a first-order flow-matching "
                "scheduler"
            )
        if self.position < 0:
            self._recorded(velocity)
        else:
            self._replayed(velocity)
        self.position += 1
        if self.position < len(self.jobs.at(self.step)):
            return None
        return self._end_step(sample)

    def _recorded(self, velocity: Tensor) -> None:
        times = self.replayable.times
        times.outside(self.began, times.clock.mark())
        if not torch.isfinite(velocity).all():
            raise StatsError(
                f"the model's output at step {self.step} holds NaN or infinity: the run "
                "overflowed; calibrate in float32 or bfloat16"
            )
        self.velocity = velocity.clone()
        if self.step == 0:
            self.velocity_bytes = velocity.nbytes
            self._allocate(velocity)
        if self.residuals is not None:
            self.residuals.add(self.replayable)

    def _allocate(self, velocity: Tensor) -> None:
        jobs, prompts = self.jobs, self.prompts
        if len(velocity) != prompts:
            raise StatsError(
                f"the scheduler got {len(velocity)} images for {prompts} prompts: leave "
                "num_images_per_prompt at 1, and give prompts one by one, not as lists"
            )
        self.sketch = CountSketch(velocity[0].numel(), self.sketch_size, self.sketch_seed)
        size = self.sketch.size
        self.sketches = np.zeros((prompts, jobs.steps, size), dtype=np.float32)
        self.latents = np.zeros((prompts, jobs.steps + 1, size), dtype=np.float32)
        if jobs.mode == "replay":
            shape = (prompts, jobs.steps, jobs.groups, jobs.lags, size)
            self.deltas: NDArray[np.float32] = np.zeros(shape, dtype=np.float32)
            self.residuals: ResidualSketches | None = None
        else:
            self.norms = np.zeros((prompts, len(jobs.scale_steps), jobs.groups), dtype=np.float32)
            self.residuals = ResidualSketches(size, self.sketch_seed, self.prompts)

    def _replayed(self, velocity: Tensor) -> None:
        assert self.velocity is not None
        delta = velocity - self.velocity
        if self.step == 0 and bool(delta.any()):
            raise StatsError(
                "this pipeline's guidance gave two results for the same transformer outputs: "
                "it keeps state between steps (momentum guidance does), so single steps "
                "cannot be replayed; switch that guidance off for calibration"
            )
        norm = self.residuals is not None
        self.row.append(delta.float().flatten(1).norm(dim=1) if norm else self.sketch(delta))

    def _end_step(self, sample: Tensor) -> Tensor:
        assert self.velocity is not None
        step, jobs, result = self.step, self.jobs, self.velocity
        if step < jobs.steps:
            self.sketches[:, step] = self.sketch(result).cpu().numpy()
            self.latents[:, step] = self.sketch(sample).cpu().numpy()
            if step and self.row:
                self._store(torch.stack(self.row, dim=1).cpu().numpy())
        if step == jobs.steps - 1:
            sigmas = sigmas_of(self.scheduler)
            self.final = (sample + (sigmas[-1] - sigmas[-2]) * result).cpu()
            self.latents[:, -1] = self.sketch(self.final).numpy()
            groups = range(jobs.groups)
            self.group_bytes = tuple(self.replayable.residual_bytes(g) for g in groups)
        self.velocity, self.position, self.row = None, -1, []
        self.velocities.append(result.cpu())
        self.replayable.end_step()
        if step == jobs.steps - 1:
            # Decoding needs the memory.
            self.replayable.end_run()
        self.replayable.times.end_step()
        self.tick()
        self.returned = self.replayable.times.clock.mark()
        return result

    def _store(self, row: NDArray[np.float32]) -> None:
        jobs, step = self.jobs, self.step
        if jobs.mode == "residual":
            self.norms[:, jobs.scale_steps.index(step)] = row
            return
        for position, (group, lag) in enumerate(jobs.at(step)):
            self.deltas[:, step, group, lag - 1] = row[:, position]

    def all_deltas(self, sigmas: tuple[float, ...]) -> NDArray[np.float32]:
        """(B, T, G, M, S) of the whole run."""
        if self.residuals is None:
            return self.deltas
        jobs = self.jobs
        steps = self.residuals.steps
        return residual_deltas(steps, self.norms, jobs.scale_steps, sigmas, jobs.lags)


def collect(
    pipe: Any,
    batch: Batch,
    replayable: ReplayableTransformer,
    jobs: Jobs,
    *,
    lags_together: int,
    sketch_size: int,
    sketch_seed: int,
    probes: int,
    tick: Tick,
) -> Measured:
    """Measure one batch: a run with replays, perturbed runs, and one that shows the image's gain.

    Args:
        pipe: The pipeline.
        batch: The prompts.
        replayable: The transformer of the pipeline, attached, with nothing recorded.
        jobs: What is replayed at which step.
        lags_together: Most lags that are replayed as one batch.
        sketch_size: S.
        sketch_seed: Seed of the sketches.
        probes: How many perturbed runs.
        tick: Called after every step.
    """
    size = len(batch.ids)
    collector = _Collector(
        pipe.scheduler, replayable, jobs, lags_together, sketch_size, sketch_seed, size, tick
    )
    replayable.on_call(collector.on_call)
    with (
        repeated_timesteps(pipe.scheduler, lambda step: 1 + len(jobs.at(step))),
        tapped_step(pipe.scheduler, collector.on_step),
    ):
        images = run_pipeline(pipe, batch)
    if len(collector.velocities) != jobs.steps:
        raise StatsError(
            f"the pipeline took {len(collector.velocities)} steps where num_inference_steps="
            f"{jobs.steps} was asked; this pipeline cannot be calibrated by replay"
        )
    velocities, final = collector.velocities, collector.final
    assert final is not None
    sigmas = sigmas_of(pipe.scheduler)
    times_ms = replayable.times.median_ms()
    outputs = sum(_bytes(branch.output) for branch in replayable.branches)
    return Measured(
        sigmas=sigmas,
        velocities=collector.sketches,
        latents=collector.latents,
        deltas=collector.all_deltas(sigmas),
        times_ms=np.tile(times_ms, (size, 1)),
        image_gain=image_gain(pipe, batch, replayable, velocities, final, images),
        amplification=measure_amplification(pipe, batch, replayable, velocities, final, probes),
        group_bytes=tuple(count // size for count in collector.group_bytes),
        velocity_bytes=collector.velocity_bytes // size,
        output_bytes=outputs // size,
        numel=collector.sketch.numel,
        branches=len(replayable.branches),
    )


def _bytes(output: Any) -> int:
    if isinstance(output, Tensor):
        return output.nbytes
    if not isinstance(output, dict | list | tuple):
        return 0
    return sum(_bytes(item) for item in (output.values() if isinstance(output, dict) else output))


@contextmanager
def repeated_timesteps(scheduler: Any, count: Callable[[int], int]) -> Iterator[None]:
    """Make the schedule hand out the timestep of step t `count(t)` times."""
    original = scheduler.set_timesteps
    had_own = "set_timesteps" in vars(scheduler)

    @functools.wraps(original)  # pipelines look at the signature for what they may pass
    def set_timesteps(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        timesteps = scheduler.timesteps
        counts = torch.tensor([count(step) for step in range(len(timesteps))])
        scheduler.timesteps = timesteps.repeat_interleave(counts.to(timesteps.device))
        if scheduler.begin_index is None:
            # Otherwise the scheduler looks its index up among the timesteps, now repeated.
            scheduler.set_begin_index(0)
        return result

    scheduler.set_timesteps = set_timesteps
    try:
        yield
    finally:
        if had_own:
            scheduler.set_timesteps = original
        else:
            del scheduler.set_timesteps
