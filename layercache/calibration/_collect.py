"""One batch measured: a recorded run, re-enactments that read the velocity deltas, perturbed runs.

Guidance is whatever the pipeline makes of the transformer's outputs, and only the pipeline knows
it. To price a replaced group in the *guided* output, the pipeline runs again once for every
(groups, lag), its transformer calls answered with what the replays of the recorded run gave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layercache.calibration._jobs import Jobs, Replay
from layercache.calibration._kept import Kept
from layercache.calibration._pace import Pace, Tick
from layercache.calibration._profile import image_gain
from layercache.calibration._propagation import measure_amplification
from layercache.calibration._record import Performers, Recorder, Run
from layercache.calibration._reenact import Reenactment, check_repeats
from layercache.calibration._residual import ResidualSketches, residual_deltas
from layercache.calibration._sketch import CountSketch
from layercache.calibration._stage import Others, Stage
from layercache.calibration.prompts import Batch
from layercache.errors import StatsError
from layercache.models.calling import call_setting

_LEAST_EXPLAINED = 0.5
"""Share of the latents' squared movement that the velocities have to explain. Euler's method leaves
nothing unexplained, multistep samplers a few per cent."""


@dataclass(frozen=True)
class Measured:
    """What one batch gave for one component; arrays as in `CalibrationStats`, B prompts long."""

    sigmas: tuple[float, ...]
    passes: int
    loads: NDArray[np.float64]
    segments: NDArray[np.float64]
    velocities: NDArray[np.float32]
    latents: NDArray[np.float32]
    deltas: NDArray[np.float32]
    responses: NDArray[np.float64]
    response_sigmas: NDArray[np.float64]
    times_ms: NDArray[np.float64]
    image_gain: NDArray[np.float64]
    amplification: NDArray[np.float64]
    group_bytes: tuple[int, ...]
    velocity_bytes: int
    output_bytes: int
    numel: int
    latent_shape: tuple[int, ...]
    pixels: tuple[int, int] | None
    branches: int


@dataclass(frozen=True)
class Sketching:
    """Sizes and seed of the sketches."""

    size: int
    seed: int


class _Deltas:
    """Velocity deltas of one component, read from re-enactments."""

    def __init__(self, run: Run, component: str, jobs: Jobs, sketch: CountSketch) -> None:
        self.run, self.component, self.jobs, self.sketch = run, component, jobs, sketch
        self.segments = run.segments(component)
        prompts = len(run.velocities[0])
        if jobs.measures:
            shape = (prompts, jobs.steps, jobs.groups, jobs.lags, sketch.size)
            self.table: NDArray[np.float32] = np.zeros(shape, dtype=np.float32)
        else:
            self.table = np.zeros((prompts, len(jobs.scale_steps), jobs.groups), dtype=np.float32)
        self.joint: dict[tuple[int, tuple[int, ...]], NDArray[np.float32]] = {}

    def read(self, step: int, velocity: Tensor, replay: Replay) -> None:
        """Note what the pipeline made of a replay at a step."""
        run, jobs, (groups, lag) = self.run, self.jobs, replay
        if run.calls[step].component != self.component or replay not in jobs.at(step):
            return
        if self.segments[step - lag] != self.segments[step]:
            return
        delta = (velocity.float() - run.velocities[step].to(velocity).float()) * run.sign
        if isinstance(run.mask, Tensor):
            delta = delta * run.mask.to(delta)
        if len(groups) > 1:
            self.joint[step, groups] = self.sketch(delta).cpu().numpy()
        elif jobs.measures:
            self.table[:, step, groups[0], lag - 1] = self.sketch(delta).cpu().numpy()
        else:
            row = self.table[:, jobs.scale_steps.index(step), groups[0]]
            row[:] = delta.flatten(1).norm(dim=1).cpu().numpy()

    @property
    def joint_steps(self) -> tuple[int, ...]:
        """Where two groups were replaced: none of another component, nor a segment's first."""
        return tuple(sorted({step for step, _ in self.joint}))

    def responses(self) -> NDArray[np.float64]:
        """(B, K, G(G-1)/2, 3) answers of later groups to earlier ones, as in `CalibrationStats`."""
        steps, couples = self.joint_steps, self.jobs.couples
        found = np.zeros((len(self.table), len(steps), len(couples), 3))
        for (step, groups), both in self.joint.items():
            first, second = (self.table[:, step, group, 0].astype(np.float64) for group in groups)
            answer = first + second - both
            row = found[:, steps.index(step), couples.index((groups[0], groups[1]))]
            products = ((answer, first), (answer, answer), (first, first))
            for column, (left, right) in enumerate(products):
                row[:, column] = np.einsum("bs,bs->b", left, right)
        return found


def collect(
    stage: Stage,
    batch: Batch,
    performers: Performers,
    jobs: Jobs,
    *,
    lags_together: int,
    kept_bytes: float,
    primed: bool,
    sketching: Sketching,
    probes: int,
    pace: Pace,
    tick: Tick,
) -> dict[str, Measured]:
    """Measure one batch.

    Args:
        stage: The pipeline.
        batch: The prompts.
        performers: Its calibrated transformers.
        jobs: What is replayed at which step.
        lags_together: Most lags that are replayed as one batch.
        kept_bytes: Bytes of outputs to keep in memory; more go to the disk.
        primed: See `Run.primed`.
        sketching: The sketches.
        probes: How many perturbed runs.
        pace: How the time of a batch divides.
        tick: Told of the work that is done, as shares that `pace` says.

    Returns:
        What was measured, by component.
    """
    size = len(batch.ids)
    run = Run(Kept(kept_bytes), primed=primed)
    residuals: dict[str, ResidualSketches] = {}
    call: dict[str, Any] = {}

    def on_step(step: int) -> None:
        call.update({} if step else call_setting(stage.pipe))
        component = run.calls[step].component
        if not jobs.measures and component in performers:
            # As long as the sketches of the velocities.
            longest = min(sketching.size, run.velocities[0][0].numel())
            new = ResidualSketches(longest, sketching.seed, size)
            residuals.setdefault(component, new).add(performers[component], step)
        tick(pace.recorded[step])

    recorder = Recorder(
        stage, performers, run, size, jobs=jobs, lags_together=lags_together, on_step=on_step
    )
    try:
        images = stage.play(batch, recorder, "note")
        run.require_whole()
        others = check_repeats(stage, batch, run)
        require_explained(run)
        sketch = CountSketch(run.velocities[0][0].numel(), sketching.size, sketching.seed)
        deltas = {name: _Deltas(run, name, jobs, sketch) for name in performers}
        _read_deltas(
            stage, batch, run, others, jobs, list(deltas.values()), lambda: tick(pace.loop)
        )
        assert images is not None
        gain = image_gain(stage, batch, run, others, images)
        amplification = measure_amplification(
            stage, batch, run, others, probes, lambda step: tick(pace.forward[step])
        )
        tables = {
            name: found.table if jobs.measures else _stand_ins(residuals[name], found, jobs, run)
            for name, found in deltas.items()
        }
    finally:
        run.kept.close()
    velocities, latents = _sketches(run, sketch)
    shared = _Shared(velocities, latents, gain, amplification, sketch.numel, call)
    return {
        name: _measured(run, performers, found, tables[name], shared)
        for name, found in deltas.items()
    }


@dataclass(frozen=True)
class _Shared:
    """What a batch gives for every component alike."""

    velocities: NDArray[np.float32]
    latents: NDArray[np.float32]
    image_gain: NDArray[np.float64]
    amplification: NDArray[np.float64]
    numel: int
    call: dict[str, Any]


def _measured(
    run: Run,
    performers: Performers,
    found: _Deltas,
    table: NDArray[np.float32],
    shared: _Shared,
) -> Measured:
    """What a batch gave for one component."""
    name, call, prompts = found.component, shared.call, len(shared.velocities)
    calls = [step for step in run.calls if step.component == name]
    return Measured(
        sigmas=run.levels,
        passes=run.passes,
        loads=run.loads(name)[run.first],
        segments=_renumbered(found.segments[run.first]),
        velocities=shared.velocities,
        latents=shared.latents,
        deltas=table[:, run.first],
        responses=found.responses(),
        response_sigmas=np.array([run.levels[step] for step in found.joint_steps]),
        times_ms=np.tile(_times(run, performers, name), (prompts, 1)),
        image_gain=shared.image_gain,
        amplification=shared.amplification,
        group_bytes=_most_bytes(run, name, prompts),
        velocity_bytes=run.velocities[0].nbytes // prompts,
        output_bytes=max(step.output_bytes for step in calls) // prompts,
        numel=shared.numel,
        latent_shape=tuple(run.velocities[0].shape[1:]),
        pixels=(call["width"], call["height"]) if {"width", "height"} <= set(call) else None,
        branches=max(len(step.shapes) for step in calls),
    )


def require_explained(run: Run) -> None:
    """Refuse a run whose latents do not follow the velocities that the scheduler was handed."""
    left = moved = 0.0
    for step in range(run.steps):
        displacement = run.displacement(step)
        predicted = (run.sigmas[step + 1] - run.sigmas[step]) * run.velocity(step)
        left += float((displacement - predicted).square().sum())
        moved += float(displacement.square().sum())
    if left > _LEAST_EXPLAINED * moved:
        raise StatsError(
            f"the latents move otherwise than the velocities say ({100 * left / moved:.0f} % of "
            "their squared movement is unexplained): this pipeline's model predicts no velocity, "
            "or its sampler takes no steps along it"
        )


def _read_deltas(
    stage: Stage,
    batch: Batch,
    run: Run,
    others: Others,
    jobs: Jobs,
    tables: Sequence[_Deltas],
    read_one: Callable[[], None],
) -> None:
    for replay in jobs.replays:

        def read(step: int, velocity: Tensor, replay: Replay = replay) -> None:
            for table in tables:
                table.read(step, velocity, replay)

        stage.play(batch, Reenactment(run, on_velocity=read, replay=replay), others)
        read_one()


def _stand_ins(
    residuals: ResidualSketches, found: _Deltas, jobs: Jobs, run: Run
) -> NDArray[np.float32]:
    """(B, T, G, M, S) in residual mode, zero across a change of the calls."""
    deltas = residual_deltas(
        residuals.rows(jobs.steps), found.table, jobs.scale_steps, run.sigmas, jobs.lags
    )
    for lag in range(1, min(jobs.lags, jobs.steps - 1) + 1):
        across = found.segments[lag:] != found.segments[:-lag]
        deltas[:, lag:, :, lag - 1][:, across] = 0
    return deltas


def _sketches(run: Run, sketch: CountSketch) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    velocities = [sketch(run.velocity(step)) for step in run.first]
    latents = [sketch(run.latents[step].float() * run.mask) for step in (*run.first, -1)]
    return torch.stack(velocities, dim=1).numpy(), torch.stack(latents, dim=1).numpy()


def _renumbered(segments: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.unique(segments, return_inverse=True)[1].astype(np.float64)


def _times(run: Run, performers: Performers, name: str) -> NDArray[np.float64]:
    own = [index for index, step in enumerate(run.calls) if step.component == name]
    return performers[name].times.median_ms(run.loads(name)[own])


def _most_bytes(run: Run, name: str, prompts: int) -> tuple[int, ...]:
    table = [step.group_bytes for step in run.calls if step.component == name]
    return tuple(max(column) // prompts for column in zip(*table, strict=True))
