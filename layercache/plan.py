"""`Plan`: which cells are computed and how the others are predicted, as a versioned JSON file.

`plans/README.md` is the specification of the format. A plan knows no solver and no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from layercache import costs
from layercache._json import require_plain
from layercache._json_file import JsonFile
from layercache._plan_parts import Budget, Certificate, Measured, ModelFingerprint, Predicted
from layercache._plan_rows import COMPUTED, IDLE, MAX_SPAN, SPANS, Schedule, UnitPlan
from layercache._version import VERSION
from layercache.errors import ModelMismatchError
from layercache.options import Options
from layercache.stats import CalibrationStats, FloatArray

__all__ = [
    "COMPUTED",
    "IDLE",
    "MAX_SPAN",
    "SCHEMA_VERSION",
    "SPANS",
    "Budget",
    "Certificate",
    "Measured",
    "ModelFingerprint",
    "Plan",
    "Predicted",
    "Schedule",
    "UnitPlan",
]

SCHEMA_VERSION: Literal[1] = 1
"""The only one; drafts of the format are not read."""
_MAX_STEPS = 10_000
_TOLD = ("guidance_scale", "guidance_scale_2", "true_cfg_scale", "guider", "dtype", "checkpoint")
"""What `made_for` tells of a setting besides size and steps."""


class Plan(JsonFile):
    """A schedule for one model, with what was predicted of it and a certificate.

    Example:
        >>> plan = Plan.load("plan.json")  # doctest: +SKIP
        >>> print(plan.summary())  # doctest: +SKIP
    """

    VERSION: ClassVar[int] = SCHEMA_VERSION
    KIND: ClassVar[str] = "plan"
    FILE_NAME: ClassVar[str] = "layercache_plan.json"
    MAX_BYTES: ClassVar[int] = 16 * 2**20

    schema_version: Literal[1] = SCHEMA_VERSION
    generator: str
    component: str = "transformer"
    model: ModelFingerprint
    setting: dict[str, Any]
    sigmas: tuple[float, ...]
    branches: int = Field(ge=1)
    units: tuple[UnitPlan, ...]
    budget: Budget
    asked: Options
    predicted: Predicted
    measured: Measured | None = None
    certificate: Certificate
    provenance: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _valid(self) -> Plan:
        require_plain(self.model_dump(), "plan")
        steps = len(self.sigmas) - 1
        if not 1 <= steps <= _MAX_STEPS:
            raise ValueError(f"sigmas has {len(self.sigmas)} values; 2 to {_MAX_STEPS + 1} can be")
        if any(a <= b for a, b in zip(self.sigmas, self.sigmas[1:], strict=False)):
            raise ValueError("sigmas must fall strictly")
        for index, unit in enumerate(self.units):
            if len(unit.cells) != steps:
                raise ValueError(f"units[{index}].cells has {len(unit.cells)} cells for {steps}")
        self._check_places()
        skipped = [not run for run in self.run_steps]
        for index, unit in enumerate(self.units):
            idle = [symbol == IDLE for symbol in unit.cells]
            if unit.kind == "group" and idle != skipped:
                step = next(i for i in range(steps) if idle[i] != skipped[i])
                raise ValueError(
                    f"units[{index}].cells[{step}] is {unit.cells[step]!r}: a group is idle (.) "
                    "at just those steps that the step unit skips"
                )
        for unit in self.units:
            unit.schedule(self.sigmas)
        return self

    def _check_places(self) -> None:
        if sum(unit.kind == "step" for unit in self.units) > 1:
            raise ValueError("units holds more than one step unit")
        taken: dict[str, int] = {}
        for index, unit in enumerate(self.units):
            if unit.kind == "group":
                name, start, stop = str(unit.block_list), unit.start or 0, unit.stop or 0
                if start < taken.get(name, 0):
                    raise ValueError(f"units[{index}] ({unit.name}) overlaps the group before it")
                if stop > self.model.block_lists.get(name, 0):
                    raise ValueError(f"units[{index}] ({unit.name}) is not in model.block_lists")
                taken[name] = stop

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, without the original's resolved rows."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("schedules", None)
        return copied

    @classmethod
    def of(
        cls,
        stats: CalibrationStats,
        budget: Budget,
        asked: Options,
        units: Sequence[UnitPlan],
        *,
        psnr: FloatArray | None,
        certificate: Certificate,
        provenance: Mapping[str, Any] | None = None,
    ) -> Plan:
        """A plan of these rows, with its costs computed from the statistics.

        Args:
            stats: Statistics at the noise levels of the plan.
            budget: What was asked for.
            asked: How it was compiled.
            units: The rows.
            psnr: (P,) what is predicted of each calibration prompt; None if nothing is.
            certificate: What is known of how good it is.
            provenance: Where it comes from.
        """
        sigmas = tuple(float(sigma) for sigma in stats.sigmas)
        schedules = {unit.name: unit.schedule(sigmas) for unit in units}
        spent = costs.spent_ms(stats, schedules)
        figures = {}
        if psnr is not None:
            figures = {
                "psnr_db": float(psnr.mean()),
                "psnr_median_db": float(np.median(psnr)),
                "psnr_worst_db": float(psnr.min()),
            }
        setting = stats.setting
        if asked.sigmas is not None:
            # The sigmas stand in the plan; what the calibration called for would contradict them.
            setting = {
                key: value
                for key, value in setting.items()
                if key != "num_inference_steps" and "shift" not in key
            }
        return cls(
            generator=f"layercache {VERSION}",
            component=stats.component,
            model=ModelFingerprint.model_validate(stats.model),
            setting=setting,
            sigmas=sigmas,
            branches=stats.branches,
            units=tuple(units),
            budget=budget,
            asked=asked,
            predicted=Predicted(
                speedup=costs.speedup_of(stats, spent),
                compute_share=spent / costs.full_ms(stats),
                cache_bytes=costs.cache_bytes(stats, schedules),
                **figures,
            ),
            certificate=certificate,
            provenance=dict(provenance or {}),
        )

    @property
    def _plans(self) -> tuple[Plan, ...]:
        return (self,)

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.sigmas) - 1

    @property
    def step_unit(self) -> UnitPlan | None:
        """The row of the whole step, if the plan has one."""
        return next((unit for unit in self.units if unit.kind == "step"), None)

    @property
    def step_row(self) -> UnitPlan:
        """The row of the whole step; one that computes every step where the plan has none."""
        return self.step_unit or UnitPlan(kind="step", cells=COMPUTED * self.num_steps)

    @property
    def groups(self) -> tuple[UnitPlan, ...]:
        """The rows of block groups, in order."""
        return tuple(unit for unit in self.units if unit.kind == "group")

    @property
    def run_steps(self) -> tuple[bool, ...]:
        """(T,) whether the transformer runs at each step."""
        return tuple(symbol == COMPUTED for symbol in self.step_row.cells)

    @cached_property
    def schedules(self) -> dict[str, Schedule]:
        """Every unit's resolved row, by unit name."""
        return {unit.name: unit.schedule(self.sigmas) for unit in self.units}

    def check(
        self, model: Mapping[str, Any], setting: Mapping[str, Any] | None = None
    ) -> list[str]:
        """Compare with a model's fingerprint; returns warnings about soft differences.

        Raises:
            ModelMismatchError: The class, block lists or architecture differ.
        """
        for name, mine in self.model.model_dump().items():
            theirs = model.get(name)
            if mine != theirs:
                raise ModelMismatchError(
                    f"this plan is for another model: {name} is {mine!r} in the plan and "
                    f"{theirs!r} in the model; compile a plan from statistics of this model"
                )
        return self.differences(setting or {})

    def differences(
        self, setting: Mapping[str, Any], left_out: Collection[str] = frozenset()
    ) -> list[str]:
        """What this setting and the plan's both know and have otherwise, in words."""
        return [
            f"{name} is {self.setting[name]!r} in the plan and {value!r} here"
            for name, value in setting.items()
            # What matters of the call stands beside it, by name.
            if name != "call" and name not in left_out
            if name in self.setting and self.setting[name] != value
        ]

    def _came_to(self) -> str:
        """What a quality that was asked for came to."""
        if self.budget.psnr_db is None:
            return ""
        if not any(any(schedule.cached) for schedule in self.schedules.values()):
            return ": everything is computed, since no caching is foretold to keep it"
        return f": foretold to be kept at {self.predicted.speedup:.2f}x"

    @property
    def made_for(self) -> str:
        """The run that the plan is for, as far as its setting tells."""
        told = self.setting
        parts = [f"{told.get('pipeline', self.model.class_name)}.{self.component}"]
        size = told.get("pixels") or [told.get("width"), told.get("height")]
        if isinstance(size, list) and all(isinstance(side, int) for side in size):
            frames = f"x{told['num_frames']} frames" if told.get("num_frames") else ""
            at = told.get("calibrated_pixels")
            other = f" (calibrated at {'x'.join(map(str, at))})" if isinstance(at, list) else ""
            parts.append("x".join(map(str, size)) + frames + other)
        steps = f"{self.num_steps} steps of {told.get('scheduler', 'an unnamed scheduler')}"
        shift = told.get("scheduler_shift", told.get("scheduler_flow_shift"))
        if told.get("scheduler_use_dynamic_shifting"):
            steps += " (shift by size)"
        elif shift is not None:
            steps += f" (shift {shift:g})" if isinstance(shift, int | float) else ""
        parts.append(steps)
        parts += [f"{name} {told[name]}" for name in _TOLD if told.get(name) is not None]
        return ", ".join(parts)

    @property
    def foretold_of(self) -> str:
        """The prompts that predicted figures are over."""
        count = self.provenance.get("calibration_prompts")
        return f"{count} calibration prompts" if isinstance(count, int) else "calibration prompts"

    def summary(self) -> str:
        """The grid and the figures, for a person."""
        p = self.predicted
        width = max((len(unit.name) for unit in self.units), default=4)
        ruler = "".join(str((s // 10) % 10) if s % 10 == 0 else " " for s in range(self.num_steps))
        lines = [
            f"Plan for {self.model.class_name}, {self.num_steps} steps, budget {self.budget}"
            + self._came_to(),
            f"  made for: {self.made_for}",
            f"  {'step':<{width}}  {ruler}",
        ]
        for unit in self.units:
            most = max(map(len, unit.taps), default=0) if unit.taps else 0
            taps = f", up to {most} taps" if most else ""
            computed = unit.cells.count(COMPUTED)
            lines.append(f"  {unit.name:<{width}}  {unit.cells}  {computed} computed{taps}")
        psnr = "unknown"
        if p.psnr_db is not None and p.psnr_worst_db is not None:
            median = "" if p.psnr_median_db is None else f"median {p.psnr_median_db:.1f}, "
            psnr = f"{p.psnr_db:.1f} dB ({median}worst prompt {p.psnr_worst_db:.1f})"
        lines += [
            "  # computed   0 skipped or reused   1-9, a-z predicted with span K   . idle",
            f"  predicted: {p.speedup:.2f}x, {100 * p.compute_share:.1f} % of the compute, "
            f"PSNR {psnr}, cache {p.cache_bytes / 2**20:.2f} MiB an image",
            f"    foretold of {self.foretold_of}, which is no bound: single prompts can come out "
            "far lower (`layercache eval` measures)",
            f"  measured: {self.measured or 'nothing'}",
            f"  certificate: {self.certificate}",
        ]
        return "\n".join(lines)
