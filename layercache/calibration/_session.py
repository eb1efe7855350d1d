"""One pipeline, set up for calibration: estimates a run and measures batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from layercache.calibration._collect import Measured, Sketching, collect
from layercache.calibration._estimate import CalibrationEstimate, estimate_run
from layercache.calibration._jobs import Jobs
from layercache.calibration._options import Options
from layercache.calibration._pace import Tick
from layercache.calibration._parts import LATENT_SHAPE, PIXELS
from layercache.calibration._replay import ReplayableTransformer
from layercache.calibration._scheduler import check_prediction
from layercache.calibration._stage import Stage
from layercache.calibration._trial import try_out
from layercache.calibration.prompts import Batch, arguments_digests
from layercache.errors import StatsError
from layercache.models.adapters import adapter_for
from layercache.models.fingerprint import model_fingerprint, setting_of
from layercache.stats import CalibrationStats, Group

Log = Callable[[str], None]


class Session:
    """A pipeline with its groups and options.

    Args:
        pipe: The pipeline.
        components: The transformers to calibrate, each with its groups.
        options: How to measure.
        call_kwargs: Pipeline arguments of every call.
    """

    def __init__(
        self,
        pipe: Any,
        components: Mapping[str, tuple[Group, ...]],
        options: Options,
        call_kwargs: Mapping[str, Any],
    ) -> None:
        check_prediction(pipe.scheduler)
        self.pipe, self.components, self.options = pipe, dict(components), options
        counts = {len(groups) for groups in self.components.values()}
        if len(counts) > 1:
            raise StatsError(
                "components that are calibrated together need equally many groups, not "
                + " and ".join(map(str, sorted(counts)))
            )
        self.num_groups = counts.pop()
        # An unknown mode is an error before anything runs.
        Jobs(options.mode, options.num_inference_steps, self.num_groups, options.lags)
        self.adapters = {
            name: adapter_for(getattr(pipe, name), required=bool(groups))
            for name, groups in self.components.items()
        }
        self.models = {name: model_fingerprint(getattr(pipe, name)) for name in self.components}
        self.settings = {
            name: setting_of(pipe, call_kwargs, component=name) for name in self.components
        }
        for setting in self.settings.values():
            others = arguments_digests(call_kwargs, setting)
            if others:
                setting["other_arguments"] = others
        self._planned: tuple[CalibrationEstimate, Jobs, bool] | None = None

    def identity(self, component: str) -> dict[str, Any]:
        """What is known before the run of `CalibrationStats.identity`."""
        options = self.options
        return {
            "mode": options.mode,
            "model": self.models[component],
            "groups": [group.name for group in self.components[component]],
            "lags": options.lags,
            "probes": options.perturbed_runs,
            "sketch_seed": options.seed,
            "sketch_size": options.sketch_size,
            "setting": self.settings[component],
            "component": component,
        }

    def estimate(self, work: Sequence[Batch]) -> CalibrationEstimate:
        """What measuring these batches will take; the decisions of `measure` follow from it."""
        largest = max(work, key=Batch.extent)
        longest = max(work, key=lambda batch: batch.extent()[::-1])
        found, jobs, primed = self._estimate_like(largest, work)
        if longest is not largest:
            # A last batch of few prompts may need more than full ones with shorter texts.
            found = found.covering(self._estimate_like(longest, work)[0])
        self._planned = found, jobs, primed
        return found

    def _estimate_like(
        self, batch: Batch, work: Sequence[Batch]
    ) -> tuple[CalibrationEstimate, Jobs, bool]:
        options = self.options
        with torch.no_grad(), self._staged(offload=False) as (stage, performers):
            trial = try_out(stage, batch, performers)
        # Image-to-image runs take fewer steps than they are asked for.
        jobs = Jobs(options.mode, trial.run.steps, self.num_groups, options.lags)
        found = estimate_run(
            trial,
            jobs,
            next(iter(performers.values())).device,
            batches=len(work),
            prompts=sum(len(each.ids) for each in work),
            batch_size=len(batch.ids),
            sketch_size=options.sketch_size,
            probes=options.perturbed_runs,
            max_memory=options.max_memory,
        )
        return found, jobs, trial.primed

    def measure(self, batch: Batch, tick: Tick) -> dict[str, CalibrationStats]:
        """Statistics of one batch by component, within the memory that `estimate` planned."""
        if self._planned is None:
            self.estimate([batch])
        assert self._planned is not None
        plan, jobs, primed = self._planned
        with torch.no_grad(), self._staged(plan.offload) as (stage, performers):
            measured = collect(
                stage,
                batch,
                performers,
                jobs,
                lags_together=plan.lags_together,
                kept_bytes=plan.kept_bytes,
                primed=primed,
                sketching=Sketching(self.options.sketch_size, self.options.seed),
                probes=self.options.perturbed_runs,
                pace=plan.pace,
                tick=tick,
            )
        return {name: self._stats(batch, name, found) for name, found in measured.items()}

    @contextmanager
    def _staged(self, offload: bool) -> Iterator[tuple[Stage, dict[str, ReplayableTransformer]]]:
        performers: dict[str, ReplayableTransformer] = {}
        stage = Stage(self.pipe, tuple(self.components))
        replays = self.options.mode == "replay" and self.num_groups > 0
        history = self.options.lags if replays else 1
        try:
            for name, groups in self.components.items():
                performers[name] = ReplayableTransformer(
                    getattr(self.pipe, name), self.adapters[name], groups, history, offload
                )
            yield stage, performers
        finally:
            for performer in performers.values():
                performer.remove()
            stage.remove()

    def _stats(self, batch: Batch, component: str, measured: Measured) -> CalibrationStats:
        order = sorted(range(len(batch.ids)), key=batch.ids.__getitem__)
        setting = {**self.settings[component], LATENT_SHAPE: list(measured.latent_shape)}
        if measured.pixels is not None:
            setting[PIXELS] = list(measured.pixels)
        return CalibrationStats(
            sigmas=np.array(measured.sigmas),
            passes=measured.passes,
            loads=measured.loads,
            segments=measured.segments,
            groups=self.components[component],
            branches=measured.branches,
            velocities=measured.velocities[order],
            latents=measured.latents[order],
            deltas=measured.deltas[order],
            responses=measured.responses[order],
            response_sigmas=measured.response_sigmas,
            times_ms=measured.times_ms[order],
            image_gain=measured.image_gain[order],
            amplification=measured.amplification[order],
            group_bytes=measured.group_bytes,
            velocity_bytes=measured.velocity_bytes,
            output_bytes=measured.output_bytes,
            numel=measured.numel,
            sketch_seed=self.options.seed,
            prompt_ids=tuple(batch.ids[i] for i in order),
            model=self.models[component],
            setting=setting,
            component=component,
            mode=self.options.mode,
            probes=self.options.perturbed_runs,
        )
