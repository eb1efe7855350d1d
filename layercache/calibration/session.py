"""One pipeline, set up for calibration: estimates a run and measures batches."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from layercache.calibration.collect import Measured, Tick, collect
from layercache.calibration.estimate import CalibrationEstimate, estimate_run
from layercache.calibration.jobs import Jobs
from layercache.calibration.prompts import Batch, arguments_digests
from layercache.calibration.propagation import PROBES
from layercache.calibration.replay import ReplayableTransformer
from layercache.errors import StatsError
from layercache.models.adapters import adapter_for
from layercache.models.fingerprint import model_fingerprint, setting_of
from layercache.stats import CalibrationStats, Group

Log = Callable[[str], None]
_LARGEST_SEED = 2**62
"""torch takes 64 bits, and parts of one residual have seeds that follow."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a calibration measures; see `calibrate`."""

    num_inference_steps: int = 50
    lags: int = 8
    seed: int = 0
    batch_size: int = 1
    sketch_size: int = 1024
    mode: str = "replay"
    probes: int | None = None
    max_memory: int | None = None

    def __post_init__(self) -> None:
        counts = ("num_inference_steps", "lags", "batch_size", "sketch_size")
        for name in (*counts, "seed", "probes", "max_memory"):
            value = getattr(self, name)
            if value is None and name in ("probes", "max_memory"):
                continue
            try:
                # NumPy's integers too; statistics keep them as JSON.
                object.__setattr__(self, name, int(operator.index(value)))
            except TypeError:
                raise StatsError(f"{name}={value!r}: it must be a whole number") from None
        if min(getattr(self, name) for name in counts) < 1:
            given = ", ".join(f"{name}={getattr(self, name)}" for name in counts)
            raise StatsError(f"{given}: each must be at least 1")
        if not -_LARGEST_SEED <= self.seed <= _LARGEST_SEED:
            raise StatsError(f"seed={self.seed}: it must have at most 62 bits")
        if self.perturbed_runs < 0:
            raise StatsError(f"probes={self.probes}: it must be at least 0")

    @property
    def perturbed_runs(self) -> int:
        """Probes of error growth a batch: none in residual mode if nothing is said."""
        if self.probes is not None:
            return self.probes
        return PROBES if self.mode == "replay" else 0


class Session:
    """A pipeline with its groups and options.

    Args:
        pipe: The pipeline.
        groups: The groups.
        options: How to measure.
        call_kwargs: Pipeline arguments of every call.
    """

    def __init__(
        self,
        pipe: Any,
        groups: tuple[Group, ...],
        options: Options,
        call_kwargs: Mapping[str, Any],
    ) -> None:
        self.pipe, self.groups, self.options = pipe, groups, options
        self.adapter = adapter_for(pipe.transformer)
        self.jobs = Jobs(options.mode, options.num_inference_steps, len(groups), options.lags)
        self.model = model_fingerprint(pipe.transformer)
        self.setting = setting_of(pipe, call_kwargs)
        others = arguments_digests(call_kwargs, self.setting)
        if others:
            self.setting["other_arguments"] = others
        self._estimate: CalibrationEstimate | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What is known before the run of `CalibrationStats.identity`."""
        options = self.options
        return {
            "mode": options.mode,
            "model": self.model,
            "groups": [group.name for group in self.groups],
            "lags": options.lags,
            "probes": options.perturbed_runs,
            "sketch_seed": options.seed,
            "sketch_size": options.sketch_size,
            "setting": self.setting,
        }

    def estimate(self, work: Sequence[Batch]) -> CalibrationEstimate:
        """What measuring these batches will take; the decisions of `measure` follow from it."""
        largest = max(work, key=Batch.extent)
        longest = max(work, key=lambda batch: batch.extent()[::-1])
        found = self._estimate_like(largest, work)
        if longest is not largest:
            # A last batch of few prompts may need more than full ones with shorter texts.
            found = found.covering(self._estimate_like(longest, work))
        self._estimate = found
        return found

    def _estimate_like(self, batch: Batch, work: Sequence[Batch]) -> CalibrationEstimate:
        replayable = self._attach(offload=False)
        try:
            with torch.no_grad():
                return estimate_run(
                    self.pipe,
                    batch,
                    replayable,
                    self.jobs,
                    batches=len(work),
                    prompts=sum(len(each.ids) for each in work),
                    sketch_size=self.options.sketch_size,
                    probes=self.options.perturbed_runs,
                    max_memory=self.options.max_memory,
                )
        finally:
            replayable.remove()

    def measure(self, batch: Batch, tick: Tick) -> CalibrationStats:
        """Statistics of one batch, within the memory that `estimate` planned."""
        plan = self._estimate or self.estimate([batch])
        replayable = self._attach(plan.offload)
        try:
            with torch.no_grad():
                measured = collect(
                    self.pipe,
                    batch,
                    replayable,
                    self.jobs,
                    lags_together=plan.lags_together,
                    sketch_size=self.options.sketch_size,
                    sketch_seed=self.options.seed,
                    probes=self.options.perturbed_runs,
                    tick=tick,
                )
        finally:
            replayable.remove()
        return self._stats(batch, measured)

    def _attach(self, offload: bool) -> ReplayableTransformer:
        return ReplayableTransformer(
            self.pipe.transformer, self.adapter, self.groups, self.jobs.history, offload
        )

    def _stats(self, batch: Batch, measured: Measured) -> CalibrationStats:
        order = sorted(range(len(batch.ids)), key=batch.ids.__getitem__)
        return CalibrationStats(
            sigmas=np.array(measured.sigmas),
            groups=self.groups,
            branches=measured.branches,
            velocities=measured.velocities[order],
            latents=measured.latents[order],
            deltas=measured.deltas[order],
            times_ms=measured.times_ms[order],
            image_gain=measured.image_gain[order],
            amplification=measured.amplification[order],
            group_bytes=measured.group_bytes,
            velocity_bytes=measured.velocity_bytes,
            output_bytes=measured.output_bytes,
            numel=measured.numel,
            sketch_seed=self.options.seed,
            prompt_ids=tuple(batch.ids[i] for i in order),
            model=self.model,
            setting=self.setting,
            mode=self.options.mode,
            probes=self.options.perturbed_runs,
        )
