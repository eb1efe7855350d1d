"""Warm, interleaved timing: every method runs in every round, so that drift hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layercache.calibration.prompts import Batch
from layercache.evaluation.methods import Method, Uncached
from layercache.models.pipelines import run_pipeline


@dataclass(frozen=True, eq=False)
class Timing:
    """What one method gave: seconds of every pipeline call, and the images of all batches."""

    seconds: tuple[float, ...]
    images: Tensor

    @property
    def median_seconds(self) -> float:
        """Median over calls."""
        return statistics.median(self.seconds)


@dataclass(frozen=True, eq=False)
class Run:
    """One generation.

    Attributes:
        images: (B, C, H, W) or (B, F, C, H, W) on the CPU, in [0, 1], or latents.
        seconds: Wall-clock time of the pipeline call.
        cpu_seconds: Processor time of the process in the call, all threads together.
    """

    images: Tensor
    seconds: float
    cpu_seconds: float


def run_once(pipe: Any, method: Method, batch: Batch) -> Run:
    """One generation under a method, with the times of the call by two clocks."""
    arguments = {**batch.arguments, **method.call_changes}
    with torch.no_grad(), method.attach(pipe):
        _synchronise()
        cpu, began = time.process_time(), time.perf_counter()
        images = run_pipeline(pipe, arguments)
        _synchronise()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return Run(images, seconds, cpu)


def time_interleaved(
    pipe: Any,
    batches: Sequence[Batch],
    methods: Sequence[Method],
    *,
    repeats: int = 1,
    warm_up: bool = True,
    tick: Callable[[], None] = lambda: None,
) -> list[Timing]:
    """Run every method on every batch, `repeats` times over, one method after the other.

    Seeds are fixed, so repeats give the same images. `tick` is called after every run.
    """
    if warm_up:
        run_once(pipe, Uncached(), batches[0])
    seconds: list[list[float]] = [[] for _ in methods]
    images: list[list[Tensor]] = [[] for _ in methods]
    for repeat in range(repeats):
        for batch in batches:
            for index, method in enumerate(methods):
                run = run_once(pipe, method, batch)
                seconds[index].append(run.seconds)
                if repeat == 0:
                    images[index].append(run.images)
                tick()
    return [Timing(tuple(s), torch.cat(i)) for s, i in zip(seconds, images, strict=True)]


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
