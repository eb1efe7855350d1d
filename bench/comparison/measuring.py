"""Held-out measurement: every setting timed between two uncached runs, and compared with them.

A setting's speedup is that of its own run over the mean of the uncached runs just before and just
after its block of a few settings, so a machine that slows down or speeds up hits both alike, and a
bench that was killed and goes on an hour later still compares what ran side by side.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bench.comparison.entrants import Entrant
from bench.comparison.equal_speed import Curve, Point
from bench.comparison.lpips import Lpips
from bench.comparison.metrics import ms_ssim
from bench.comparison.store import Store
from bench.comparison.work import PeakMemory
from layercache._write import write_file
from layercache.calibration.prompts import Batch
from layercache.evaluation._latency import Run, run_once
from layercache.evaluation.methods import Uncached
from layercache.evaluation.metrics import fidelity

Clock = Literal["wall", "cpu"]

BLOCK = 6
"""Settings between two uncached runs."""

SHOWN = 3
"""Images of the first batch that are kept for the sheets."""


class Measuring:
    """Measures entrants on batches of held-out prompts; every result is kept on disk.

    Args:
        pipe: The pipeline.
        store: Where results are kept.
        batches: The held-out prompts.
        rounds: Timed runs of each setting and batch.
        clock: "wall", or "cpu" for a machine that others use as well: processor time counts what
            this process did, whoever else was served in between.
        lpips: The metric, where its weights are at hand.
        on_failure: Called with a family and what went wrong when a foreign method fails.
        foreign: Families whose failure is reported instead of raised.
    """

    def __init__(
        self,
        pipe: Any,
        store: Store,
        batches: Sequence[Batch],
        *,
        rounds: int = 1,
        clock: Clock = "wall",
        lpips: Lpips | None = None,
        foreign: frozenset[str] = frozenset(),
        on_failure: Callable[[str, Exception], None] = lambda family, error: None,
        tick: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.pipe, self.store, self.batches = pipe, store, batches
        self.rounds, self.clock, self.lpips, self.tick = rounds, clock, lpips, tick
        self.foreign, self.on_failure = foreign, on_failure
        self.failed: set[str] = set()

    def run(self, entrants: Sequence[Entrant]) -> None:
        """Measure what is not measured yet."""
        for round_ in range(self.rounds):
            for number, batch in enumerate(self.batches):
                missing = [e for e in entrants if not self.path(e, number, round_).exists()]
                self.tick(len(entrants) - len(missing))
                if missing:
                    self._batch(missing, batch, number, round_)

    def path(self, entrant: Entrant, batch: int, round_: int) -> Path:
        """Where one result lies."""
        title = f"{entrant.family} {entrant.label} batch {batch} round {round_}"
        return self.store.path(title, entrant.method, self.batches[batch].ids)

    def _batch(self, entrants: Sequence[Entrant], batch: Batch, number: int, round_: int) -> None:
        run_once(self.pipe, Uncached(), batch)  # warm-up
        before = run_once(self.pipe, Uncached(), batch)
        reference = before.images
        if number == 0 and round_ == 0:
            self._keep(self._references_path, reference)
        for start in range(0, len(entrants), BLOCK):
            block = entrants[start : start + BLOCK]
            ran = [(entrant, self._one(entrant, batch)) for entrant in block]
            after = run_once(self.pipe, Uncached(), batch)
            for entrant, result in ran:
                if result is not None:
                    run, peak = result
                    path = self.path(entrant, number, round_)
                    if number == 0 and round_ == 0:
                        self._keep(path.with_suffix(".npy"), run.images)
                    value = {
                        "method": entrant.family,
                        "setting": entrant.label,
                        "compute_share": entrant.method.compute_share,
                        "predicted_speedup": entrant.method.predicted_speedup,
                        "seconds": run.seconds,
                        "cpu_seconds": run.cpu_seconds,
                        "uncached_seconds": (before.seconds + after.seconds) / 2,
                        "uncached_cpu_seconds": (before.cpu_seconds + after.cpu_seconds) / 2,
                        "peak_bytes": peak,
                        "prompts": list(batch.ids),
                        **self._fidelity(run.images, reference),
                    }
                    self.store.write(path, value)
            self.tick(len(block))
            before = after

    def _one(self, entrant: Entrant, batch: Batch) -> tuple[Run, int | None] | None:
        if entrant.family in self.failed:
            return None
        memory = PeakMemory()
        memory.start()
        try:
            run = run_once(self.pipe, entrant.method, batch)
        except Exception as error:
            if entrant.family not in self.foreign:
                raise
            self.failed.add(entrant.family)
            self.on_failure(entrant.family, error)
            return None
        return run, memory.stop()

    def _fidelity(self, images: Tensor, reference: Tensor) -> dict[str, list[float] | None]:
        close = fidelity(images, reference)
        scales = ms_ssim(images, reference)
        distances = None if self.lpips is None else self.lpips(images, reference)
        return {
            "psnr": list(close.psnr_db),
            "ssim": list(close.ssim or ()),
            "ms_ssim": None if scales is None else scales.tolist(),
            "lpips": None if distances is None else distances.tolist(),
        }

    def _keep(self, path: Path, images: Tensor) -> None:
        stream = io.BytesIO()
        np.save(stream, images[:SHOWN].numpy())
        write_file(path, stream.getvalue())

    def curves(self, entrants: Sequence[Entrant]) -> dict[str, Curve]:
        """What was measured, by family; families that failed are left out."""
        points: dict[str, list[Point]] = {}
        for entrant in entrants:
            if entrant.family not in self.failed:
                points.setdefault(entrant.family, []).append(self._point(entrant))
        return {family: Curve(family, tuple(found)) for family, found in points.items()}

    def _point(self, entrant: Entrant) -> Point:
        rounds = [
            [self.store.read(self.path(entrant, number, r)) for number in range(len(self.batches))]
            for r in range(self.rounds)
        ]
        every = [result for results in rounds for result in results]
        values = {
            name: np.concatenate([result[name] for result in rounds[0]])
            for name in ("psnr", "ssim", "ms_ssim", "lpips")
            if all(result[name] is not None for result in rounds[0])
        }
        peaks = [result["peak_bytes"] for result in every]
        return Point(
            label=entrant.label,
            speedup=statistics.median(self._ratio(result) for result in every),
            compute_share=entrant.method.compute_share,
            values=values,
            predicted_speedup=entrant.method.predicted_speedup,
            peak_bytes=None if None in peaks else max(peaks),
        )

    def _ratio(self, result: Mapping[str, float]) -> float:
        name = "seconds" if self.clock == "wall" else "cpu_seconds"
        return result[f"uncached_{name}"] / result[name]

    def uncached_seconds(self, entrants: Sequence[Entrant]) -> list[float]:
        """Wall-clock time of an uncached batch beside each result, sorted."""
        return sorted(
            float(self.store.read(self.path(entrant, number, round_))["uncached_seconds"])
            for entrant in entrants
            if entrant.family not in self.failed
            for number in range(len(self.batches))
            for round_ in range(self.rounds)
        )

    def images(self, entrant: Entrant) -> Tensor:
        """(SHOWN, C, H, W) first images of a setting."""
        return torch.from_numpy(np.load(self.path(entrant, 0, 0).with_suffix(".npy")))

    def references(self) -> Tensor:
        """The uncached ones."""
        return torch.from_numpy(np.load(self._references_path))

    @property
    def _references_path(self) -> Path:
        return self.store.path("uncached images", self.batches[0].ids, suffix=".npy")
