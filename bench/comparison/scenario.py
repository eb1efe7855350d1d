"""What the bench runs: model settings, how much of everything, and the speeds that are compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from bench.training.sample import call_arguments as picture_arguments
from bench.training.sample import held_out_captions, load_model, training_captions
from bench.training.state import read_names
from layercache.calibration.prompts import Batch, batches
from layercache.reference import call_arguments, load_pipeline, prompts
from layercache.reference.pipeline import GUIDANCE, SHIFT, STEPS, WEIGHTS
from layercache.reference.prompts import Split

TARGETS = (1.37, 1.71, 2.0, 3.0, 4.0)
"""Measured speedups at which methods are compared: the two published ones, then round ones."""

SEEDS: dict[Split, int] = {"calibration": 0, "validation": 1, "held-out": 2}

PICTURES = Path(__file__).parents[1] / "models" / "pictures"
_AROUND = (0.94, 1.06)
_BEYOND = 1.22
_ALIKE = 1.05


@dataclass(frozen=True)
class Scenario:
    """A model and a way to use it: number of steps, guidance scale (1 is off), shift of the sigmas.

    The model is `"first"`, which ships with the package, or `"pictures"` (`bench/models/pictures`).
    """

    name: str
    steps: int
    guidance: float
    shift: float
    model: str = "first"

    @property
    def branches(self) -> int:
        """Transformer calls a step."""
        return 2 if self.guidance > 1 else 1

    @property
    def title(self) -> str:
        """In words."""
        guided = f"guidance {self.guidance:g}" if self.guidance > 1 else "no guidance"
        which = "" if self.model == "first" else f"{self.model}: "
        return f"{which}{self.steps} steps, {guided}, shift {self.shift:g}"

    def load(self, weights: Path | None = None) -> Any:
        """The pipeline with this scenario's scheduler."""
        pipe = load_pipeline(weights or WEIGHTS) if self.model == "first" else load_model(PICTURES)
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=self.shift)
        return pipe

    def arguments(self) -> dict[str, Any]:
        """Of a pipeline call, without its prompt and generator."""
        setting: dict[str, Any] = {
            "num_inference_steps": self.steps,
            "true_cfg_scale": self.guidance,
        }
        if self.model == "first":
            arguments = call_arguments(**setting)
        else:
            arguments = picture_arguments([0], negative_prompt="", **setting)
        del arguments["generator"]
        if self.branches == 1:
            del arguments["negative_prompt"]
        return arguments

    def prompts(self, split: Split, count: int) -> list[str]:
        """The first prompts of a split."""
        if self.model == "first":
            return prompts(split, count)
        _, names = read_names(PICTURES)
        if split == "held-out":
            return held_out_captions(names, count, seed=SEEDS[split])
        return training_captions(names, count, seed=SEEDS[split])

    def work(self, split: Split, count: int, size: int) -> list[Batch]:
        """The first prompts of a split, `size` a call, with the seed of the split."""
        return batches(self.prompts(split, count), SEEDS[split], size, self.arguments())


MAIN = Scenario("main", STEPS, GUIDANCE, SHIFT)
SECOND = Scenario("second", 28, 1.0, 2.0)
THIRD = Scenario("pictures", 28, 3.0, 2.0, "pictures")
SCENARIOS = {scenario.name: scenario for scenario in (MAIN, SECOND, THIRD)}


@dataclass(frozen=True)
class BenchSize:
    """How much the bench does.

    Attributes:
        calibration: Prompts that every method may be fitted to.
        validation: Prompts on which settings are chosen.
        held_out: Prompts that are reported.
        batch: Prompts a pipeline call, at calibration, validation and measurement.
        lags: Lags that calibration measures.
        rounds: Timed runs of each setting and batch.
        targets: Measured speedups that are compared.
        grid: Share of the settings that a rival's sweep tries, 1 for all.
    """

    calibration: int = 16
    validation: int = 8
    held_out: int = 16
    batch: int = 8
    lags: int = 8
    rounds: int = 3
    targets: tuple[float, ...] = field(default=TARGETS)
    grid: float = 1.0

    def fresh_steps(self, steps: int) -> tuple[int, ...]:
        """Numbers of computed steps that methods with a budget are swept over, the largest first.

        One to either side of every target, so that interpolation is over short stretches, and one
        beyond the last, for methods whose overhead makes them slower than their share of compute.

        Example:
            >>> BenchSize(targets=(2.0, 4.0)).fresh_steps(50)
            (27, 24, 13, 12, 10)
        """
        speeds = [target * factor for target in self.targets for factor in _AROUND]
        speeds.append(max(self.targets) * _BEYOND)
        counts = sorted({min(steps, max(1, round(steps / speed))) for speed in speeds})
        kept: list[int] = []
        for count in counts:
            if not kept or count >= _ALIKE * kept[-1]:
                kept.append(count)
        return tuple(reversed(kept))


QUICK = BenchSize(
    calibration=4,
    validation=2,
    held_out=4,
    batch=4,
    lags=3,
    rounds=1,
    targets=(1.37, 2.0),
    grid=0.1,
)
