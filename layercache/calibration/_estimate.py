"""What a calibration run will take, from two short generations: time and memory."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from layercache.calibration._jobs import Jobs
from layercache.calibration._pace import Pace
from layercache.calibration._propagation import probe_steps
from layercache.calibration._trial import Trial
from layercache.errors import StatsError

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
        disk_bytes: Bytes of replayed outputs that go to temporary files, for one batch.
        kept_bytes: Bytes of them that stay in memory.
        file_bytes: Statistics of all prompts.
        offload: Whether residuals are kept on the CPU.
        lags_together: Most lags that are replayed as one batch.
        sigmas: (T+1,) noise levels of the run.
        pace: How the time of a batch divides.
    """

    mode: str
    prompts: int
    batch_size: int
    generations: float
    generation_seconds: float
    seconds: float
    peak_bytes: int
    host_bytes: int
    disk_bytes: int
    kept_bytes: int
    file_bytes: int
    offload: bool
    lags_together: int
    sigmas: tuple[float, ...]
    pace: Pace = field(repr=False)

    def covering(self, other: CalibrationEstimate) -> CalibrationEstimate:
        """The same, with room for what another batch of the run needs."""
        return replace(
            self,
            peak_bytes=max(self.peak_bytes, other.peak_bytes),
            host_bytes=max(self.host_bytes, other.host_bytes),
            disk_bytes=max(self.disk_bytes, other.disk_bytes),
            kept_bytes=min(self.kept_bytes, other.kept_bytes),
            offload=self.offload or other.offload,
            lags_together=min(self.lags_together, other.lags_together),
        )

    def __str__(self) -> str:
        place = "on the CPU" if self.offload else "on the model's device"
        host = f" and {_size(self.host_bytes)} on the CPU" if self.host_bytes else ""
        if self.disk_bytes:
            host += f", {_size(self.disk_bytes)} in temporary files"
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


def estimate_run(
    trial: Trial,
    jobs: Jobs,
    device: torch.device,
    *,
    batches: int,
    prompts: int,
    batch_size: int,
    sketch_size: int,
    probes: int,
    max_memory: int | None,
) -> CalibrationEstimate:
    """Plan a calibration within a bound on memory, from what short generations took.

    Args:
        trial: The short generations.
        jobs: What is replayed at which step.
        device: Where the model computes.
        batches: Pipeline calls that the run makes for its main part.
        prompts: Prompts in all of them.
        batch_size: Prompts in the largest.
        sketch_size: S.
        probes: Perturbed runs a batch.
        max_memory: Bytes above the model; None for most of what is free.

    Raises:
        StatsError: Even one lag at a time, with residuals on the CPU, needs more than the bound.
    """
    run = trial.run
    warm = {
        name: np.median(rows[min(1, len(rows) - 1) :], axis=0)
        for name, rows in trial.seconds.items()
    }
    forward = {name: float(row[:-1].sum()) for name, row in warm.items()}
    typical = float(np.mean(list(forward.values())))
    by_step = np.array([forward.get(step.component, typical) for step in run.calls])
    memory = _plan_memory(trial, jobs, device, sketch_size, max_memory)
    ratio = trial.pair_ratio if memory.lags_together > 1 else 1.0
    reruns = probe_steps(run.levels, probes)
    again = by_step[run.first]
    recorded = by_step.copy()
    for index, step in enumerate(run.calls):
        if step.component in warm:
            row = warm[step.component][:-1]
            recorded[index] += ratio * float(row.sum()) * _replayed_forwards(jobs, index, row)
    computed = float(recorded.sum() + sum(again[step + 1 :].sum() for step in reruns))
    outside = float(np.mean([row[-1] for row in warm.values()]))
    loops = (4 + len(reruns) + len(jobs.replays)) * jobs.steps
    each = computed + loops * outside + 3 * trial.fixed_seconds
    size = min(sketch_size, run.velocities[0][0].numel())
    sketch = jobs.steps * (2 + jobs.groups * jobs.lags) * size * 4
    return CalibrationEstimate(
        mode=jobs.mode,
        prompts=prompts,
        batch_size=batch_size,
        generations=computed / max(float(by_step.sum()), 1e-12),
        generation_seconds=float(by_step.sum()),
        seconds=batches * each,
        peak_bytes=memory.peak_bytes,
        host_bytes=memory.host_bytes,
        disk_bytes=memory.disk_bytes,
        kept_bytes=memory.kept_bytes,
        file_bytes=prompts * sketch,
        offload=memory.offload,
        lags_together=memory.lags_together,
        sigmas=run.levels,
        pace=Pace.of(recorded + outside, by_step, jobs.steps * outside, each),
    )


def _replayed_forwards(jobs: Jobs, step: int, seconds: NDArray[np.float64]) -> float:
    """Replays at a step, in forwards: one runs the rest, and the groups after its first."""
    groups, rest, whole = seconds[:-1], float(seconds[-1]), float(seconds.sum())
    took = 0.0
    for replaced, _ in jobs.at(step):
        after = [seconds for g, seconds in enumerate(groups) if g > min(replaced)]
        took += rest + sum(after) - sum(groups[list(replaced[1:])])
    return took / max(whole, 1e-12)


@dataclass(frozen=True)
class _Memory:
    peak_bytes: int
    host_bytes: int
    disk_bytes: int
    kept_bytes: int
    offload: bool
    lags_together: int


def _plan_memory(
    trial: Trial, jobs: Jobs, device: torch.device, sketch_size: int, max_memory: int | None
) -> _Memory:
    """Choose where residuals and outputs are kept, and how many lags run together."""
    limit = default_bound(device) if max_memory is None else max_memory
    run, on_cpu = trial.run, device.type == "cpu"
    sizes = [step.group_bytes for step in run.calls if step.group_bytes]
    step = max(map(sum, sizes), default=0)
    widest = max((max(row) for row in sizes), default=0)
    prompts, numel = len(run.velocities[0]), run.velocities[0][0].numel()
    velocity = prompts * numel * 4
    size = min(sketch_size, numel)
    rows = prompts * (2 + jobs.groups * jobs.lags) * size * 4
    # Hash tables, a velocity, its difference and its signed copy, and the sketches of a step.
    sketching = 5 * numel + 4 * velocity + rows
    if jobs.mode == "residual":
        # Tables of every stream, and a residual in float32 twice.
        sketching += (5 // prompts + 12) * step // 2
    host = jobs.steps * (5 * velocity + rows * (3 if jobs.mode == "residual" else 1))
    kept = (
        trial.kept_bytes
        // jobs.steps
        * (jobs.steps + sum(len(jobs.at(step)) for step in range(jobs.steps)))
    )
    # A replayed lag needs a forward's memory, its residual, and the streams put in its place.
    alone = trial.pair_bytes / 2 if trial.pairs else trial.forward_bytes
    lag_bytes = _MARGIN * (alone + 3 * widest)

    def need(offload: bool, lags: int) -> int:
        held = 0 if offload else trial.held_bytes + jobs.history * step
        # The trial kept outputs and residuals on the device.
        moved = trial.held_bytes - 2 * widest if offload else 0
        forward = _MARGIN * (trial.forward_bytes - moved)
        extra = sketching + (host if on_cpu else 0)
        return int(
            max(trial.plain_peak, trial.live + held + max(forward, lags * lag_bytes)) + extra
        )

    most = min(jobs.history, max(1, MOST_ROWS // prompts)) if trial.pairs else 1
    for offload in (False,) if on_cpu else (False, True):
        fitting = [lags for lags in range(1, most + 1) if need(offload, lags) <= limit]
        if fitting:
            peak = need(offload, fitting[-1])
            room = limit - peak if on_cpu else host_bound()
            in_memory = min(kept, room)
            away = host + (trial.held_bytes + jobs.history * step if offload else 0)
            return _Memory(
                peak_bytes=peak + (in_memory if on_cpu else 0),
                host_bytes=0 if on_cpu else away + in_memory,
                disk_bytes=kept - in_memory,
                kept_bytes=in_memory,
                offload=offload,
                lags_together=fitting[-1],
            )
    smallest = need(not on_cpu, 1)
    raise StatsError(
        f"calibration needs at least {_size(smallest)} above the model, more than max_memory="
        f"{limit} bytes ({_size(limit)}): raise it, or lower batch_size, groups or lags"
    )


def host_bound() -> int:
    """Bytes of the CPU's memory that outputs may take while the model is elsewhere."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return DEFAULT_BYTES


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
