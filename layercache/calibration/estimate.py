"""What a calibration run will take, from a few timed forwards: seconds, and bytes above the model.

Two short generations tell. In the first, three steps are computed and timed, and the rest answered
with known outputs; in the second, one step is computed while memory is watched, and the pipeline's
own peak (text encoding, decoding) is seen on the way.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layercache.calibration.jobs import Jobs
from layercache.calibration.memory import PeakMemory
from layercache.calibration.profile import run_pipeline
from layercache.calibration.prompts import Batch
from layercache.calibration.propagation import probe_steps
from layercache.calibration.replay import ReplayableTransformer
from layercache.errors import StatsError
from layercache.models.stepping import sigmas_of, tapped_step

TIMED_STEPS = 3
DEFAULT_BYTES = 4 * 2**30
"""Bound where the device does not say what is free."""
MOST_ROWS = 32
"""Rows of a replayed batch: on the reference model a row took 4.6 ms among 8, 3.4 ms among 32 and
3.9 ms among 64."""
_FREE_SHARE = 0.9
_MARGIN = 1.15
"""Allocators round up, and a longer prompt than the first needs more."""


@dataclass(frozen=True, kw_only=True)
class CalibrationEstimate:
    """Time and memory of a run that has not started.

    Attributes:
        mode: `"replay"` or `"residual"`.
        prompts: Prompts still to be measured here.
        batch_size: Prompts a pipeline call.
        generations: Compute of one prompt, in full generations.
        generation_seconds: Transformer time of one full generation of a batch.
        seconds: Time of the whole run.
        peak_bytes: Bound on bytes above the model's on its device; the run keeps below it.
        host_bytes: Bytes on the CPU besides, at most, for one batch; measured statistics add up to
            `file_bytes`, and joining and saving them takes a few times that.
        file_bytes: Statistics of all prompts.
        offload: Whether residuals are kept on the CPU.
        lags_together: Most lags that are replayed as one batch.
        sigmas: (T+1,) noise levels of the run.
    """

    mode: str
    prompts: int
    batch_size: int
    generations: float
    generation_seconds: float
    seconds: float
    peak_bytes: int
    host_bytes: int
    file_bytes: int
    offload: bool
    lags_together: int
    sigmas: tuple[float, ...]

    def covering(self, other: CalibrationEstimate) -> CalibrationEstimate:
        """The same, with room for what another batch of the run needs."""
        return replace(
            self,
            peak_bytes=max(self.peak_bytes, other.peak_bytes),
            host_bytes=max(self.host_bytes, other.host_bytes),
            offload=self.offload or other.offload,
            lags_together=min(self.lags_together, other.lags_together),
        )

    def __str__(self) -> str:
        place = "on the CPU" if self.offload else "on the model's device"
        host = f" and {_size(self.host_bytes)} on the CPU" if self.host_bytes else ""
        return (
            f"calibration of {self.prompts} prompts, {self.mode} mode: about "
            f"{_duration(self.seconds)} ({self.generations:.1f} full generations a prompt, "
            f"{self.generation_seconds:.1f} s each for a batch of {self.batch_size}); at most "
            f"{_size(self.peak_bytes)} above the model{host}; residuals {place}, "
            f"lags replayed {self.lags_together} at a time; {_size(self.file_bytes)} of statistics"
        )


def default_bound(device: torch.device) -> int:
    """Bytes that a run may use above the model if nothing else is said."""
    if device.type != "cuda":
        return DEFAULT_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(_FREE_SHARE * (free + cached))


class _Probe:
    """A generation whose first steps are computed; the others get the last computed velocity."""

    def __init__(
        self, replayable: ReplayableTransformer, computed: int, memory: PeakMemory | None
    ) -> None:
        self.replayable, self.computed, self.memory = replayable, computed, memory
        self.step = self.number = 0
        self.velocity: Tensor | None = None
        self.plain_peak = self.live = self.forward_bytes = self.pair_bytes = 0
        self.held_bytes = 0
        self.pair_seconds = 0.0
        self.pairs = False
        self.began: Any = None
        self.returned: Any = None

    def on_call(self, *args: Any, **kwargs: Any) -> Any:
        branch, self.number = self.number, self.number + 1
        times = self.replayable.times
        if self.step >= self.computed:
            return self.replayable.branches[branch].output
        if branch == 0:
            self.began = times.clock.mark()
            if self.returned is not None:
                times.outside(self.returned, self.began)
        if self.memory is None:
            return self.replayable.record(branch, args, kwargs)
        self._lap()
        before = self.memory.live
        self.live = max(self.live, before)
        output = self.replayable.record(branch, args, kwargs)
        self.forward_bytes = max(self.forward_bytes, self._lap() - before)
        return output

    def on_step(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        self.number = 0
        if self.step >= self.computed:
            assert self.velocity is not None
            return self.velocity.to(velocity)
        times = self.replayable.times
        times.outside(self.began, times.clock.mark())
        if self.step == self.computed - 1:
            if self.replayable.lags > 1:
                self._pair()
            self.held_bytes = self.replayable.held_bytes()
        self.velocity = velocity
        self.replayable.end_step()
        times.end_step()
        self.step += 1
        self.returned = times.clock.mark()
        return velocity

    def _pair(self) -> None:
        """Run a batch twice as large as the recorded one."""
        clock, before = self.replayable.times.clock, 0
        if self.memory is not None:
            self._lap()
            before = self.memory.live
        start = clock.mark()
        self.pairs = self.replayable.batches_repeat(0)
        self.pair_seconds = clock.seconds(start, clock.mark())
        if self.memory is not None:
            # Calibration's own, so that it is no part of the plain peak.
            self.pair_bytes = self.memory.lap() - before

    def _lap(self) -> int:
        assert self.memory is not None
        found = self.memory.lap()
        self.plain_peak = max(self.plain_peak, found)
        return found


def _run(
    pipe: Any, batch: Batch, replayable: ReplayableTransformer, computed: int, watch: bool
) -> tuple[_Probe, float]:
    """One short generation and the seconds it took."""
    replayable.times.clear()
    replayable.branches.clear()
    memory = PeakMemory(replayable.device) if watch else None
    probe = _Probe(replayable, computed, memory)
    replayable.on_call(probe.on_call)
    began = time.perf_counter()
    with memory or nullcontext(), tapped_step(pipe.scheduler, probe.on_step):
        run_pipeline(pipe, batch)
        if watch:
            probe._lap()
    return probe, time.perf_counter() - began


def estimate_run(
    pipe: Any,
    batch: Batch,
    replayable: ReplayableTransformer,
    jobs: Jobs,
    *,
    batches: int,
    prompts: int,
    sketch_size: int,
    probes: int,
    max_memory: int | None,
) -> CalibrationEstimate:
    """Probe a pipeline and plan its calibration within a bound on memory.

    Args:
        pipe: The pipeline.
        batch: The largest batch of the run.
        replayable: The transformer of the pipeline, attached, holding nothing on the CPU.
        jobs: What is replayed at which step.
        batches: Pipeline calls that the run makes for its main part.
        prompts: Prompts in all of them.
        sketch_size: S.
        probes: Perturbed runs a batch.
        max_memory: Bytes above the model; None for most of what is free.

    Raises:
        StatsError: Even one lag at a time, with residuals on the CPU, needs more than the bound.
    """
    timed, seconds = _run(pipe, batch, replayable, min(TIMED_STEPS, jobs.steps), watch=False)
    rows = replayable.times.seconds()
    watched, _ = _run(pipe, batch, replayable, 1, watch=True)
    sigmas = sigmas_of(pipe.scheduler)

    warm = np.median(rows[min(1, len(rows) - 1) :], axis=0)
    forward, outside = float(warm[:-1].sum()), float(warm[-1])
    fixed = max(0.0, seconds - float(rows.sum()) - timed.pair_seconds)
    branches = max(1, len(replayable.branches))
    pair_ratio = timed.pair_seconds / max(2 * forward / branches, 1e-12)
    memory = _plan_memory(replayable, watched, jobs, sketch_size, max_memory)
    ratio = pair_ratio if memory.lags_together > 1 else 1.0
    replays = ratio * _replayed_forwards(jobs, warm[:-1])
    reruns = [jobs.steps - step - 1 for step in probe_steps(sigmas, probes)]
    forwards = jobs.steps + replays + sum(reruns)
    job_count = sum(len(jobs.at(step)) for step in range(jobs.steps))
    loops = (2 + len(reruns)) * jobs.steps + job_count
    each = forwards * forward + loops * outside + (2 + len(reruns)) * fixed
    assert watched.velocity is not None
    size = min(sketch_size, watched.velocity[0].numel())
    sketch = jobs.steps * (1 + jobs.groups * jobs.lags) * size * 4
    return CalibrationEstimate(
        mode=jobs.mode,
        prompts=prompts,
        batch_size=len(batch.ids),
        generations=forwards / jobs.steps,
        generation_seconds=jobs.steps * forward,
        seconds=batches * each,
        peak_bytes=memory.peak_bytes,
        host_bytes=memory.host_bytes,
        file_bytes=prompts * sketch,
        offload=memory.offload,
        lags_together=memory.lags_together,
        sigmas=sigmas,
    )


def _replayed_forwards(jobs: Jobs, seconds: NDArray[np.float64]) -> float:
    """Replays of a whole run, in forwards: group g's runs the rest and the groups after it."""
    groups, rest, whole = seconds[:-1], float(seconds[-1]), float(seconds.sum())
    after = np.cumsum(groups[::-1])[::-1] - groups + rest
    counts = np.zeros(jobs.groups)
    for step in range(1, jobs.steps):
        for group, _ in jobs.at(step):
            counts[group] += 1
    return float(counts @ after) / max(whole, 1e-12)


@dataclass(frozen=True)
class _Memory:
    peak_bytes: int
    host_bytes: int
    offload: bool
    lags_together: int


def _plan_memory(
    replayable: ReplayableTransformer,
    probe: _Probe,
    jobs: Jobs,
    sketch_size: int,
    max_memory: int | None,
) -> _Memory:
    """Choose where residuals live and how many lags run together."""
    device = replayable.device
    limit = default_bound(device) if max_memory is None else max_memory
    step = sum(replayable.residual_bytes(g) for g in range(jobs.groups))
    widest = max(replayable.residual_bytes(g) for g in range(jobs.groups))
    assert probe.velocity is not None
    prompts, numel = len(probe.velocity), probe.velocity[0].numel()
    velocity = prompts * numel * 4
    size = min(sketch_size, numel)
    rows = prompts * (1 + jobs.groups * jobs.lags) * size * 4
    # Hash tables, a velocity, its difference and its signed copy, and the sketches of a step.
    sketching = 5 * numel + 4 * velocity + rows
    if jobs.mode == "residual":
        # Tables of every stream, and a residual in float32 twice.
        elements = sum(
            max(sum(stream.numel() for stream in streams.values()) for streams in branch.residuals)
            for branch in replayable.branches
        )
        sketching += 5 * elements // prompts + 12 * elements
    answers = jobs.history * prompts * numel * 4 * len(replayable.branches)
    # A replayed lag needs a forward's memory, its residual, and the streams put in its place.
    alone = probe.pair_bytes / 2 if probe.pairs else probe.forward_bytes
    lag_bytes = _MARGIN * (alone + 3 * widest)
    host = jobs.steps * (velocity + rows * (3 if jobs.mode == "residual" else 1))

    def need(offload: bool, lags: int) -> int:
        held = 0 if offload else probe.held_bytes + jobs.history * step
        # The probe kept outputs and residuals on the device.
        moved = probe.held_bytes - 2 * widest if offload else 0
        forward = _MARGIN * (probe.forward_bytes - moved)
        replay = lags * lag_bytes + answers
        extra = sketching + (host if device.type == "cpu" else 0)
        return int(max(probe.plain_peak, probe.live + held + max(forward, replay)) + extra)

    most = min(jobs.history, max(1, MOST_ROWS // prompts)) if probe.pairs else 1
    for offload in (False, True) if device.type != "cpu" else (False,):
        fitting = [lags for lags in range(1, most + 1) if need(offload, lags) <= limit]
        if fitting:
            away = host + (probe.held_bytes + jobs.history * step if offload else 0)
            return _Memory(
                need(offload, fitting[-1]),
                0 if device.type == "cpu" else away,
                offload,
                fitting[-1],
            )
    smallest = need(device.type != "cpu", 1)
    raise StatsError(
        f"calibration needs at least {_size(smallest)} above the model, more than max_memory="
        f"{limit} bytes ({_size(limit)}): raise it, or lower batch_size, groups or lags"
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
