"""One scheduler's runs under a plan: which step a call belongs to, and what each unit does there.

Decisions about units are made once per forward, at the root, from the plan alone. They never depend
on data, so that processes of one parallel run agree without talking to each other.

A pipeline has one session. A copy of it with a scheduler of its own (servers make one a request)
has another, so that runs may be nested, interleaved or made by several threads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from layercache.costs import STEP
from layercache.errors import ModelMismatchError
from layercache.models._foreign import starts_anywhere
from layercache.models.calling import call_setting, latent_shape
from layercache.models.clock import Clock
from layercache.models.fingerprint import setting_of
from layercache.models.gates import Call
from layercache.models.patching import own_methods
from layercache.models.stepping import (
    Stepped,
    levels,
    moved_sample,
    sigmas_of,
    solver_of,
    tap_step,
)
from layercache.models.tensors import map_tensors, tensors_in
from layercache.plan import Plan
from layercache.runtime._groups import Branch
from layercache.runtime._position import Position, compare_sigmas
from layercache.runtime._record import Record
from layercache.runtime._report import RunReport
from layercache.runtime._surroundings import Loop
from layercache.runtime._units import Units
from layercache.runtime.arithmetic import signature

if TYPE_CHECKING:
    from layercache.runtime._run import PlanRun

_CPU = torch.device("cpu")
OnMismatch = Literal["error", "compute"]
_SIZES = frozenset({"height", "width", "num_frames"})


class Session:
    """The runs of one pipeline and scheduler. Made by `PlanRun`."""

    def __init__(self, run: PlanRun, pipe: Any) -> None:
        self.pipe, self.scheduler = pipe, pipe.scheduler
        self.run = run
        self._clock = Clock(_CPU)
        self._position = Position(self.scheduler, run.plans[0].sigmas)
        self._record = Record()
        self.units = self._units_of(run.plans[0])
        # Found out when the first run begins and the scheduler has its timesteps.
        self._solver = ""
        self._levels: tuple[float, ...] = ()
        self._step = -1
        # Under a scheduler that calls the model twice a step: the last step that the plan made, so
        # that its second call has nothing to do; and what each branch returned to the first call.
        self._owned: int | None = None
        self._again = False
        self._forms: dict[Branch, Any] = {}
        self._undo: list[Callable[[], None]] = []
        self._controlled = False
        self._caller: Any = None
        self._loop: Loop | None = None
        self._signatures: dict[Branch, tuple[Any, ...]] = {}
        # The calls of the step under way, and whether each was computed.
        self._called: dict[Branch, bool] = {}
        # Steps that the scheduler made in a run in which this transformer was not called yet.
        self._unclaimed: tuple[Any, set[int]] = (None, set())

    def _units_of(self, plan: Plan) -> Units:
        return Units(plan, self.run.transformer, self.run.adapter, self._note, self._clock)

    @property
    def plan(self) -> Plan:
        """The plan that is followed, of several that of the latest run."""
        return self.units.plan

    def install(self) -> None:
        """Follow the scheduler, and the progress bar around the pipeline's loop."""
        # What a shallow copy took over acts on what it was copied from.
        own_methods(self.pipe)
        own_methods(self.scheduler)
        self._undo.append(tap_step(self.scheduler, self._guided, self._moved))
        self._undo += self.run.watch(self.pipe)

    def remove(self) -> None:
        """Let go of both. A second call does nothing."""
        while self._undo:
            self._undo.pop()()
        self.end()
        self._caller = None
        self._signatures.clear()

    def end(self) -> None:
        """The run under way, if any, was left: nothing is kept for it."""
        self._loop = None
        self._called.clear()
        self._forms.clear()
        self.units.flush()

    # -- calls of the transformer --------------------------------------------------------------

    def forward(
        self, caller: Any, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A call of the transformer by `caller`, which is None where that is not known."""
        step = self._locate(caller)
        if step is None:
            return inner(*args, **kwargs)
        branch = self._position.branch(self.run.context.name)
        if step == self._owned:
            # The second call of a step that the plan has made: whatever comes of it is dropped.
            form = self._forms.get(branch)
            return inner(*args, **kwargs) if form is None else map_tensors(torch.zeros_like, form)
        shapes = signature(args, kwargs)
        if self._signatures.setdefault(branch, shapes) != shapes:
            self._signatures[branch] = shapes
            if any(schedule.cached[step] for schedule in self.plan.schedules.values()):
                self._note("inputs changed shape, dtype or device within a run")
            self.units.flush(branch)
        if self._loop is None:
            self._loop = self.run.loops.innermost(self._left)
        record, clock, units = self._record, self._clock, self.units
        record.held(self.units.held_bytes)
        device = next((tensor.device for tensor in tensors_in([args, kwargs])), _CPU)
        # Other devices' clocks would have to wait for them.
        clock.device = device if device.type == "cuda" else _CPU
        start = clock.mark()
        answer = units.step.answer(step, branch)
        if answer is not None:
            self._called[branch] = False
            if self._position.twice:
                self._forms[branch] = answer
            record.count(STEP, branch, step, False, start, clock.mark())
            return answer
        self._called[branch] = True
        for group in units.groups:
            group.begin(step, branch)
        with units.timeless.during(branch, kwargs):
            output = self.run.traced(inner, args, kwargs)
        for group in units.groups:
            computed = group.end()
            if computed is not None:
                record.count(group.name, branch, step, computed, *group.marks)
        record.count(STEP, branch, step, True, start, clock.mark())
        units.step.computed(step, branch, output)
        if self._position.twice:
            self._forms[branch] = map_tensors(torch.Tensor.detach, output)
        return output

    def failed(self) -> None:
        """The call under way raised."""
        for group in self.units.groups:
            group.cancel()
        self.end()

    def _left(self, loop: Loop) -> None:
        if loop is self._loop:
            self.end()

    def _locate(self, caller: Any) -> int | None:
        """The plan's step of this call, or None where the plan does not apply."""
        position = self._position
        found = position.advance(self.run.context.told)
        if found is None:
            return None
        begins, index = found
        if begins:
            self._begin_run(caller, index)
        step = index + position.offset
        if step < 0 and starts_anywhere(self.scheduler):
            step = 0  # found out at the scheduler's first step
        elif step < 0 and self._controlled:
            self._mismatched(f"it starts {-step} steps before the plan")
        # A run belongs to who began it.
        if caller is not self._caller or not self._controlled or step >= self.plan.num_steps:
            return None
        if step != position.step:
            self._begin_step(step)
        return step

    def _begin_run(self, caller: Any, index: int) -> None:
        self.end()
        self.run.begins(self)
        if len(self.run.plans) > 1:
            self.units = self._units_of(self._chosen(caller))
        self.units.begin_run()
        self._signatures.clear()
        self._controlled = False
        first = self._record.runs == 0 and self is not self.run.main
        self._record = Record(self.run.count())
        self._position.begin()
        self._caller = caller
        sigmas, steps = self._unclaimed
        position = self._position
        steps = {position.locate(call)[0] for call in steps}
        if first:
            # Before its first call of this transformer nobody watched a copy's scheduler.
            begin = getattr(self.scheduler, "begin_index", None) or 0
            steps = set(range(position.locate(begin)[0], index))
        if first or sigmas is self.scheduler.sigmas:
            self._record.steps_elsewhere |= steps
        self._unclaimed = (None, set())
        self._levels = levels(self.scheduler.sigmas.tolist())
        self._owned = None
        if any(self.units.step.schedule.cached):
            self._solver = self._solver or solver_of(self.scheduler)
        self._controlled = self._matches(sigmas_of(self.scheduler))
        cached = any(any(group.schedule.cached) for group in self.units.groups)
        if self._controlled and position.twice and cached:
            name = type(self.scheduler).__name__
            self._mismatched(
                f"{name} calls the model twice a step, the plan caches groups of blocks"
            )
        self._compare_setting(caller)

    def _matches(self, sigmas: tuple[float, ...]) -> bool:
        self._position.offset, what = compare_sigmas(self.plan.sigmas, sigmas)
        if what is not None:
            self._mismatched(what)
        return what is None

    def _chosen(self, caller: Any) -> Plan:
        """Of several plans the first for these noise levels, nearest to this setting."""
        sigmas = sigmas_of(self.scheduler)
        fitting = [p for p in self.run.plans if compare_sigmas(p.sigmas, sigmas)[1] is None]
        here = self._setting(caller)
        return min(
            fitting or self.run.plans,
            key=lambda plan: (
                abs(plan.num_steps - len(sigmas) + 1),
                len(plan.differences(here)),
            ),
        )

    def _mismatched(self, what: str) -> None:
        """The run under way is not the plan's: raise, or compute it in full."""
        self._controlled = False
        if len(self.run.plans) > 1:
            what += f" (the nearest of {len(self.run.plans)} plans)"
        if self.run.on_mismatch == "error":
            raise ModelMismatchError(
                f"this run follows another noise schedule than the plan: {what}. Run with the "
                "plan's step count, shift and resolution, compile a plan for this schedule, or "
                'pass on_mismatch="compute" to compute such runs in full'
            )
        self._note(f"another noise schedule: {what}")
        self.run.warn(f"this run is computed in full: {what}")

    def _compare_setting(self, caller: Any) -> None:
        """Note what this run's pipeline, scheduler and arguments have otherwise than the plan."""
        # The shape of the latents says what the arguments were, however they were rounded.
        left_out = _SIZES if "latent_shape" in self.plan.setting else frozenset()
        for text in self.plan.differences(self._setting(caller), left_out):
            self._note(text)

    def _setting(self, caller: Any) -> dict[str, Any]:
        held = getattr(caller, self.run.component, None) is self.run.transformer
        pipe = caller if held else self.pipe
        return {**setting_of(pipe, component=self.run.component), **call_setting(pipe)}

    def _begin_step(self, step: int) -> None:
        before = self._position.step
        if before >= 0:
            self.units.finish_step(before)
            if any(s not in self._record.steps_elsewhere for s in range(before + 1, step)):
                # What is stored may belong to other steps than those that it was stored for: a
                # scheduler that finds its own starting point tells it only after its first step.
                self._note(f"the run jumped from step {before} to step {step}")
                self.units.flush()
        self._position.enter(step)
        self._record.steps_seen.add(step)
        self._called.clear()

    # -- the scheduler's step ------------------------------------------------------------------

    def _guided(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        self.run.check_root()
        self._step = -1
        position, record = self._position, self._record
        at, second = position.locate(index)
        self._again = second and at + position.offset == self._owned
        if self._again:
            position.stepped()
            return velocity
        called = position.under_way and bool(self._called)
        position.stepped()
        if not called:
            self._stepped_elsewhere(index, at)
            return velocity
        self._step = step = position.step
        if position.twice and self.plan.step_unit is not None:
            self._owned = step
        record.calls[step] = len(self._called)
        if len(record.calls) == 1:
            self._compare_shape(sample)
        record.velocity_bytes = velocity.nbytes
        result = self.units.step.guided(step, velocity, self._called)
        record.held(self.units.held_bytes)
        self.units.finish_step(step)
        self._called.clear()
        record.stepped()
        self._warn_at_end(step)
        return result

    def _moved(self, used: Tensor, sample: Tensor, result: Any) -> Tensor | None:
        """Where the plan moves the latent to instead of a scheduler that leans on steps before.

        Its own step was made all the same, to keep its index; from the first skipped step on, what
        it keeps of the steps before is not what it takes it for. Where it would call the model
        twice a step, the plan makes every step, of the first call alone.
        """
        step = self._step
        if self._again:
            return sample.to(moved_sample(result))
        if self._position.twice:
            if step != self._owned:
                return None
        elif self._solver != "other" or step < self.units.step.executor.first_pause:
            return None
        if isinstance(result, Stepped) and not self._record.calls.get(step):
            # Another plan, of the model that made this step, has moved it.
            return None
        index = step - self._position.offset
        # Not the plan's sigmas, since the scheduler's may rise.
        length = self._levels[index + 1] - self._levels[index]
        made = moved_sample(result)
        return (sample.float() + length * used.float()).to(made)

    def _compare_shape(self, sample: Tensor) -> None:
        planned, here = self.plan.setting.get("latent_shape"), latent_shape(sample)
        if planned is not None and list(planned) != here:
            self._note(f"the latents of an image are {planned} in the plan and {here} here")

    def _stepped_elsewhere(self, call: int, index: int) -> None:
        """Another model of the pipeline made this step: an expert's plan has nothing to do here."""
        if not self._position.under_way:
            sigmas, steps = self._unclaimed
            if sigmas is not self.scheduler.sigmas:
                steps = set()
            self._unclaimed = (self.scheduler.sigmas, steps | {call})
        elif self._controlled:
            self._step = step = index + self._position.offset
            self._record.steps_elsewhere.add(step)
            self.units.finish_step(step)
            self._warn_at_end(step)

    # -- bookkeeping ---------------------------------------------------------------------------

    def _note(self, problem: str) -> None:
        self._record.problems[problem] += 1

    def _warn_at_end(self, step: int) -> None:
        if step == self.plan.num_steps - 1:
            self.run.warn_of(self.report(Counter(), timed=False))

    def report(self, others: Counter[str], timed: bool = True) -> RunReport:
        """What the latest run did; `others` are calls by other pipelines, by class."""
        report = self._record.report(self.units, others, timed)
        if len(self.run.plans) < 2 or not report.runs:
            return report
        number = self.run.plans.index(self.plan)
        speed = self.plan.predicted.speedup
        text = f"{number} of {len(self.run.plans)}: {self.plan.num_steps} steps, {speed:.2f}x"
        return replace(report, plan=text)
