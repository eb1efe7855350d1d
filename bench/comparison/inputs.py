"""What methods are fitted to: statistics and trajectories of calibration prompts, kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bench.comparison.scenario import SEEDS, BenchSize, Scenario
from bench.comparison.store import Store
from layercache.calibration import calibrate
from layercache.calibration.prompts import Batch
from layercache.evaluation._trajectories import Trajectories, collect_trajectories
from layercache.stats import CalibrationStats

GROUPS = 4
PUBLISHED_GROUPS = 3


@dataclass(frozen=True, eq=False)
class Inputs:
    """The pipeline, and what is measured on calibration prompts before anything is compared."""

    pipe: Any
    scenario: Scenario
    size: BenchSize
    store: Store
    log: Callable[[str], None]
    progress: bool = False

    def stats(
        self, groups: int | None = GROUPS, count: int | None = None, mode: str = "replay"
    ) -> CalibrationStats:
        """Statistics with a number of groups (None: one a block), measured once and kept.

        Args:
            groups: As in `calibrate`.
            count: How many of the calibration prompts; None is all of them.
            mode: As in `calibrate`; `"residual"` prices groups by the change of their features.
        """
        count = count or self.size.calibration
        path = self.store.path(
            f"stats groups {groups} prompts {count}" + ("" if mode == "replay" else f" {mode}"),
            self.size.lags,
            self.size.batch,
            suffix=".npz",
        )
        if not path.exists():
            self.log(f"calibrating {count} prompts in {groups or 'as many as blocks'} groups")
            calibrate(
                self.pipe,
                self.scenario.prompts("calibration", count),
                num_inference_steps=self.scenario.steps,
                groups=groups,
                mode=mode,
                lags=self.size.lags,
                seed=SEEDS["calibration"],
                batch_size=self.size.batch,
                call_kwargs=self.scenario.arguments(),
                progress=self.progress,
            ).save(path)
        return CalibrationStats.load(path)

    @cached_property
    def calibration(self) -> Batch:
        """All calibration prompts in one call."""
        (batch,) = self.scenario.work("calibration", self.size.calibration, self.size.calibration)
        return batch

    @cached_property
    def trajectories(self) -> Trajectories:
        """Uncached runs of the calibration prompts, in the order of `calibration`."""

        def run() -> dict[str, Any]:
            self.log("recording uncached trajectories")
            found = collect_trajectories(self.pipe, [self.calibration])
            return {
                "sigmas": found.sigmas,
                "latents": found.latents,
                "velocities": found.velocities,
            }

        return Trajectories(**self.store.kept_arrays("trajectories", self.calibration.ids, run))

    @cached_property
    def fresh_steps(self) -> tuple[int, ...]:
        """Numbers of computed steps that methods with a budget are swept over."""
        return self.size.fresh_steps(self.scenario.steps)

    @cached_property
    def sigmas(self) -> tuple[float, ...]:
        """The T+1 noise levels of the uncached run."""
        return tuple(float(sigma) for sigma in self.trajectories.sigmas)
