"""What a run did, next to what its plan said."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

# Allocations are whole tensors; a larger difference means that the plan was not followed.
_BYTES_TOLERANCE = 0.05


@dataclass(frozen=True)
class UnitReport:
    """One unit in the latest run, by branch.

    Counts are steps; `otherwise` counts those at which a branch was called and the unit did not do
    what the plan says. Bytes are peaks between two steps: `bytes_planned` takes the number of
    tensors from the plan and their size from this run. The step unit's `guided` outputs belong to
    all branches. Seconds are those spent in the unit where it was computed and where it was
    predicted, on the device for CUDA and on the host otherwise.
    """

    name: str
    planned_computed: int
    planned_predicted: int
    seen_computed: dict[str, int]
    seen_predicted: dict[str, int]
    otherwise: dict[str, int]
    bytes_planned: dict[str, int]
    bytes_seen: dict[str, int]
    seconds_computed: dict[str, float]
    seconds_predicted: dict[str, float]

    @property
    def as_planned(self) -> bool:
        """Whether every branch did what the plan says wherever it was called."""
        return not any(self.otherwise.values())


@dataclass(frozen=True)
class RunReport:
    """The latest run of the pipeline under a plan. `print` it, or take `to_dict()`.

    `cache_bytes_planned` is the plan's formula with the tensor sizes of this run, for all its
    images and branches; `cache_bytes_predicted` is the plan's figure for one image;
    `cache_bytes_seen` the peak between two steps. `steps_elsewhere` counts steps that the scheduler
    made without a call of this transformer, as with the two experts of Wan 2.2. `calls_seen` is the
    largest number of calls a step, next to the plan's branches. `other_calls` counts calls by other
    pipelines, by class, since the plan was put on: those were computed in full. `plan` says which
    plan of a set the run took. `timeless_computed` and `timeless_reused` count calls of blocks that
    see no timestep; `timeless_bytes`, what was held for them, is in `cache_bytes_planned` and
    `cache_bytes_seen` but not in the plan's figure.
    """

    steps_planned: int
    steps_seen: int
    steps_elsewhere: int
    units: tuple[UnitReport, ...]
    cache_bytes_planned: int
    cache_bytes_predicted: int
    cache_bytes_seen: int
    seconds: float
    runs: int
    problems: dict[str, int] = field(default_factory=dict)
    calls_planned: int = 0
    calls_seen: int = 0
    other_calls: dict[str, int] = field(default_factory=dict)
    plan: str = ""
    timeless_computed: int = 0
    timeless_reused: int = 0
    timeless_bytes: int = 0

    @property
    def warnings(self) -> tuple[str, ...]:
        """What differs from the plan, in words; empty if nothing does."""
        if self.runs == 0:
            others = [
                f"{count} calls by another {name} were computed in full"
                for name, count in self.other_calls.items()
            ]
            return ("the pipeline has not been run under this plan", *others)
        found = [
            message if count == 1 else f"{message} ({count} times)"
            for message, count in self.problems.items()
        ]
        if self.calls_seen and self.calls_seen != self.calls_planned:
            found.append(
                f"the transformer was called {self.calls_seen} times a step and the plan is for "
                f"{self.calls_planned}: guidance differs"
            )
        if self.steps_seen + self.steps_elsewhere != self.steps_planned:
            found.append(
                f"{self.steps_seen + self.steps_elsewhere} of {self.steps_planned} planned steps "
                "were run"
            )
        elif self.steps_seen == 0:
            found.append("this transformer was not called")
        else:
            found += [f"{u.name} differs from the plan" for u in self.units if not u.as_planned]
        if self.steps_seen != self.steps_planned:
            # The peak may lie at a step that was not run.
            return tuple(found)
        difference = self.cache_bytes_seen - self.cache_bytes_planned
        # A branch that is called at some steps only need not hold anything when the others peak.
        if self._called_throughout:
            difference = abs(difference)
        if difference > _BYTES_TOLERANCE * max(self.cache_bytes_planned, 1):
            found.append(
                f"the cache held {self.cache_bytes_seen} bytes at its peak, "
                f"{self.cache_bytes_planned} were planned"
            )
        return tuple(found)

    @property
    def _called_throughout(self) -> bool:
        return all(
            unit.seen_computed[branch] + unit.seen_predicted[branch] == self.steps_seen
            for unit in self.units
            if unit.name == "step"
            for branch in unit.seen_computed
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "warnings": list(self.warnings)}

    def __str__(self) -> str:
        width = max([len(unit.name) for unit in self.units] + [4])
        elsewhere = f" ({self.steps_elsewhere} by another model)" if self.steps_elsewhere else ""
        lines = [
            f"Run {self.runs}: {self.steps_seen} of {self.steps_planned} steps{elsewhere}, "
            f"{self.seconds:.2f} s, cache {_mib(self.cache_bytes_seen)} at its peak "
            f"(planned {_mib(self.cache_bytes_planned)}; "
            f"{_mib(self.cache_bytes_predicted)} an image in the plan file)",
            f"  {'unit':<{width}}  {'branch':<10}  computed (planned)  predicted (planned)"
            "  computing  predicting  held (planned)",
        ]
        if self.plan:
            lines.insert(1, f"  plan {self.plan}")
        for unit in self.units:
            for branch in unit.seen_computed:
                lines.append(
                    f"  {unit.name:<{width}}  {branch:<10}  "
                    f"{unit.seen_computed[branch]:>8} {f'({unit.planned_computed})':>9}  "
                    f"{unit.seen_predicted[branch]:>9} {f'({unit.planned_predicted})':>9}  "
                    f"{_ms(unit.seconds_computed[branch]):>9}  "
                    f"{_ms(unit.seconds_predicted[branch]):>10}  "
                    f"{_mib(unit.bytes_seen[branch])} ({_mib(unit.bytes_planned[branch])})"
                )
        if self.timeless_computed:
            lines.append(
                f"  blocks that see no timestep: {self.timeless_computed} calls computed, "
                f"{self.timeless_reused} reused, {_mib(self.timeless_bytes)} of the cache"
            )
        lines += [
            f"  {count} calls by another {name}, computed in full"
            for name, count in self.other_calls.items()
        ]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"
