"""One calibration run: full compute, with velocities, velocity deltas and times on the way.

Guidance is whatever the pipeline makes of the transformer's outputs, and only the pipeline knows
it. To price a replaced group in the *guided* output, every timestep is therefore handed to the
pipeline 1 + G M times: first the model computes and is recorded, then the same transformer calls
are answered by replays, one (group, lag) after another, and the pipeline applies its guidance to
each. The scheduler moves once, after the last, with the velocity of the first.
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

from layercache.calibration.profile import image_gain, profile_run, run_pipeline
from layercache.calibration.prompts import Batch
from layercache.calibration.propagation import measure_amplification
from layercache.calibration.replay import ReplayableTransformer
from layercache.calibration.sketch import CountSketch
from layercache.errors import StatsError
from layercache.models.stepping import sigmas_of, tapped_step


@dataclass(frozen=True)
class Measured:
    """What one batch gave; arrays as in `CalibrationStats`, B prompts long."""

    sigmas: tuple[float, ...]
    velocities: NDArray[np.float32]
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
        steps: int,
        sketch: _LazySketch,
        tick: Tick,
    ) -> None:
        self.scheduler = scheduler
        self.replayable, self.sketch, self.tick = replayable, sketch, tick
        groups, lags = len(replayable.groups), replayable.lags
        self.jobs = [(group, lag) for group in range(groups) for lag in range(1, lags + 1)]
        self.position = -1  # -1 records; then one position a job
        self.number = 0
        self.velocity: Tensor | None = None
        self.velocities: list[NDArray[np.float32]] = []
        self.raw: list[Tensor] = []
        self.final: Tensor | None = None
        self.deltas: list[NDArray[np.float32]] = []
        self.row: list[NDArray[np.float32]] = []
        self.outputs: dict[tuple[int, int, int], Any] = {}
        self.batched: bool | None = None
        self.output_bytes = self.velocity_bytes = 0
        self.steps = steps

    def on_call(self, *args: Any, **kwargs: Any) -> Any:
        number, self.number = self.number, self.number + 1
        if self.position < 0:
            return self.replayable.record(number, args, kwargs)
        group, lag = self.jobs[self.position]
        if lag > len(self.velocities):
            return self.replayable.branches[number].output
        if (number, group, lag) not in self.outputs:
            self._replay(number, group)
        return self.outputs.pop((number, group, lag))

    def _replay(self, number: int, group: int) -> None:
        lags = list(range(1, min(self.replayable.lags, len(self.velocities)) + 1))
        if self.batched is None:
            self.batched = self.replayable.batches_repeat(number)
        for chunk in [lags] if self.batched else [[lag] for lag in lags]:
            results = self.replayable.replay(number, group, chunk)
            for lag, output in zip(chunk, results, strict=True):
                self.outputs[number, group, lag] = output

    def on_step(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor | None:
        step, self.number = len(self.velocities), 0
        if index != step:
            raise StatsError(
                f"the scheduler is at step {index} where step {step} was expected; calibration "
                "needs a plain text-to-image run of a first-order flow-matching scheduler"
            )
        if self.position < 0:
            if not torch.isfinite(velocity).all():
                raise StatsError(
                    f"the model's output at step {step} holds NaN or infinity: the run overflowed; "
                    "calibrate in float32 or bfloat16"
                )
            self.velocity = velocity.clone()
            self.velocity_bytes = velocity.numel() * velocity.element_size()
        assert self.velocity is not None
        if self.position >= 0:
            self.row.append(self.sketch(velocity - self.velocity))
            if step == 0 and not torch.equal(velocity, self.velocity):
                raise StatsError(
                    "this pipeline's guidance gave two results for the same transformer outputs: "
                    "it keeps state between steps (momentum guidance does), so single steps "
                    "cannot be replayed; switch that guidance off for calibration"
                )
        self.position += 1
        if self.position < len(self.jobs):
            return None
        result, self.velocity, self.position = self.velocity, None, -1
        self.velocities.append(self.sketch(result))
        self.raw.append(result.cpu())
        if len(self.raw) == self.steps:
            sigmas = sigmas_of(self.scheduler)
            self.final = (sample + (sigmas[-1] - sigmas[-2]) * result).cpu()
        self.deltas.append(np.stack(self.row, axis=1))
        self.row = []
        self.replayable.end_step()
        self.tick()
        return result


Tick = Callable[[], None]


class _LazySketch:
    """A `CountSketch` that is made when the first velocity shows its size."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.sketch: CountSketch | None = None

    def __call__(self, tensor: Tensor) -> NDArray[np.float32]:
        if self.sketch is None:
            self.sketch = CountSketch(tensor[0].numel(), self.size, self.seed)
        result: NDArray[np.float32] = self.sketch(tensor).cpu().numpy()
        return result


def collect(
    pipe: Any,
    batch: Batch,
    replayable: ReplayableTransformer,
    steps: int,
    sketch_size: int,
    sketch_seed: int,
    tick: Tick,
) -> Measured:
    """Measure one batch: a plain run with timers, the run with replays, and perturbed runs."""
    profile = profile_run(pipe, batch, replayable)
    replayable.branches.clear()
    sketch = _LazySketch(sketch_size, sketch_seed)
    collector = _Collector(pipe.scheduler, replayable, steps, sketch, tick)
    replayable.on_call(collector.on_call)
    with (
        repeated_timesteps(pipe.scheduler, 1 + len(collector.jobs)),
        tapped_step(pipe.scheduler, collector.on_step),
    ):
        images = run_pipeline(pipe, batch)
    if len(collector.velocities) != steps:
        raise StatsError(
            f"the pipeline took {len(collector.velocities)} steps where num_inference_steps="
            f"{steps} was asked; this pipeline cannot be calibrated by replay"
        )
    size = len(batch.ids)
    assert collector.sketch.sketch is not None and collector.final is not None
    groups, lags = len(replayable.groups), replayable.lags
    deltas = np.stack(collector.deltas, axis=1)  # (B, T, G M, S)
    outputs = [_bytes(branch.output) for branch in replayable.branches]
    amplification = measure_amplification(pipe, batch, replayable, collector.raw, collector.final)
    return Measured(
        sigmas=sigmas_of(pipe.scheduler),
        velocities=np.stack(collector.velocities, axis=1),
        deltas=deltas.reshape(size, steps, groups, lags, -1),
        times_ms=np.tile(profile.times_ms, (size, 1)),
        image_gain=image_gain(images, profile),
        amplification=amplification,
        group_bytes=tuple(replayable.residual_bytes(g) // size for g in range(groups)),
        velocity_bytes=collector.velocity_bytes // size,
        output_bytes=sum(outputs) // size,
        numel=collector.sketch.sketch.numel,
        branches=len(replayable.branches),
    )


def _bytes(output: Any) -> int:
    if isinstance(output, Tensor):
        return output.numel() * output.element_size()
    items = output.values() if isinstance(output, dict) else output
    return sum(_bytes(item) for item in items) if not isinstance(output, str) else 0


@contextmanager
def repeated_timesteps(scheduler: Any, count: int) -> Iterator[None]:
    """Make the schedule hand out each timestep `count` times."""
    original = scheduler.set_timesteps
    had_own = "set_timesteps" in vars(scheduler)

    @functools.wraps(original)  # pipelines look at the signature for what they may pass
    def set_timesteps(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        scheduler.timesteps = scheduler.timesteps.repeat_interleave(count)
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
