"""What the latest run did, as it happens; `RunReport` is what is shown of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping

from layercache.costs import peak_bytes
from layercache.models.clock import Clock, Mark
from layercache.plan import Plan
from layercache.runtime._groups import Branch, GroupRunner
from layercache.runtime._report import RunReport, UnitReport
from layercache.runtime._steps import StepRunner
from layercache.runtime._units import Units


class Record:
    """Counts, bytes and times of one run, by unit and branch."""

    def __init__(self, runs: int = 0) -> None:
        self.runs = runs
        self.problems: Counter[str] = Counter()
        self.steps_seen: set[int] = set()
        self.calls: dict[int, int] = {}
        self.steps_elsewhere: set[int] = set()
        self.peak_bytes = 0
        self.velocity_bytes = 0
        # By unit and branch: whether each step was computed.
        self._seen: dict[str, dict[Branch, dict[int, bool]]] = {}
        self._spans: dict[tuple[str, Branch, bool], list[tuple[Mark, Mark]]] = {}
        self._started = self._ended = time.perf_counter()

    def count(
        self,
        unit: str,
        branch: Branch,
        step: int,
        computed: bool,
        start: Mark = None,
        end: Mark = None,
    ) -> None:
        """One call of a unit at a step, computed or predicted, and between which marks."""
        self._seen.setdefault(unit, {}).setdefault(branch, {})[step] = computed
        if start is not None and end is not None:
            self._spans.setdefault((unit, branch, computed), []).append((start, end))

    def held(self, size: int) -> None:
        """So many bytes are held now."""
        self.peak_bytes = max(self.peak_bytes, size)

    def stepped(self) -> None:
        """A step was made."""
        self._ended = time.perf_counter()

    def report(
        self,
        units: Units,
        others: Mapping[str, int],
        timed: bool = True,
    ) -> RunReport:
        """Next to what the plan said. Times wait for the device; `timed=False` leaves them out."""
        plan = units.plan
        planned = peak_bytes(
            plan.schedules,
            {group.name: sum(group.bytes_per_value.values()) for group in units.groups},
            self.velocity_bytes,
            sum(units.step.bytes_per_output.values()),
        )
        # Held from the first step to the last, so beside whatever the plan holds at its peak.
        planned += units.timeless.peak_bytes
        runners = [units.by_name[unit.name] for unit in plan.units]
        return RunReport(
            steps_planned=plan.num_steps,
            steps_seen=len(self.steps_seen),
            steps_elsewhere=len(self.steps_elsewhere),
            units=tuple(self._unit(plan, runner, timed) for runner in runners),
            cache_bytes_planned=planned,
            cache_bytes_predicted=plan.predicted.cache_bytes,
            cache_bytes_seen=self.peak_bytes,
            seconds=self._ended - self._started,
            runs=self.runs,
            problems=dict(self.problems),
            calls_planned=plan.branches,
            calls_seen=max(self.calls.values(), default=0),
            other_calls=dict(others),
            timeless_computed=units.timeless.computed,
            timeless_reused=units.timeless.reused,
            timeless_bytes=units.timeless.peak_bytes,
        )

    def _unit(self, plan: Plan, runner: StepRunner | GroupRunner, timed: bool) -> UnitReport:
        name, schedule = runner.name, runner.schedule
        seen, whole = self._seen.get(name, {}), isinstance(runner, StepRunner)
        branches = sorted(seen, key=lambda b: (b[0] or "", b[1]))
        steps = [s for s in range(plan.num_steps) if s not in self.steps_elsewhere]
        many = max(
            schedule.stored_at(s) + (whole and schedule.pauses_at(s)) for s in range(plan.num_steps)
        )
        if isinstance(runner, StepRunner):
            # One output a branch at a time, and the guided outputs, which all branches share.
            outputs = runner.bytes_per_output
            bytes_planned = {label(b): outputs.get(b, 0) for b in branches}
            bytes_seen = dict(bytes_planned)
            bytes_planned["guided"] = many * self.velocity_bytes
            bytes_seen["guided"] = runner.peak_guided_bytes
        else:
            bytes_planned = {label(b): many * runner.bytes_per_value.get(b, 0) for b in branches}
            bytes_seen = {label(b): runner.peak_bytes.get(b, 0) for b in branches}
        computed = {b: sum(seen[b].values()) for b in branches}
        return UnitReport(
            name=name,
            planned_computed=sum(schedule.computed[s] for s in steps),
            planned_predicted=sum(schedule.cached[s] for s in steps),
            seen_computed={label(b): computed[b] for b in branches},
            seen_predicted={label(b): len(seen[b]) - computed[b] for b in branches},
            otherwise={
                label(b): sum(done == schedule.cached[step] for step, done in seen[b].items())
                for b in branches
            },
            bytes_planned=bytes_planned,
            bytes_seen=bytes_seen,
            seconds_computed={label(b): self._time(name, b, True, timed) for b in branches},
            seconds_predicted={label(b): self._time(name, b, False, timed) for b in branches},
        )

    def _time(self, unit: str, branch: Branch, computed: bool, timed: bool) -> float:
        spans = self._spans.get((unit, branch, computed), ()) if timed else ()
        return sum((Clock.seconds(*span) for span in spans), 0.0)


def label(branch: Branch) -> str:
    """A branch for people: `cond`, or `call 0` where the pipeline gave no name."""
    name, ordinal = branch
    if name is None:
        return f"call {ordinal}"
    return name if ordinal == 0 else f"{name} {ordinal}"
