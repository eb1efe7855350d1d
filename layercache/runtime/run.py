"""The controller: knows the step and the branch of every transformer call, and directs the units.

Decisions are made once per forward, at the root, from the plan alone. They never depend on data,
so that processes of one parallel run agree without talking to each other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from layercache.errors import LayerCacheError, ModelMismatchError, UnsupportedModelError
from layercache.models.adapters import Adapter, blocks_of, unwrap
from layercache.models.gates import Call, Gate, is_compiled
from layercache.models.patching import Function, wrap_method
from layercache.models.stepping import sigmas_of, tap_step
from layercache.plan import Plan
from layercache.runtime.arithmetic import device_of, signature
from layercache.runtime.groups import Branch, GroupRunner
from layercache.runtime.position import Position, compare_sigmas
from layercache.runtime.record import STEP, Record
from layercache.runtime.report import RunReport
from layercache.runtime.steps import StepRunner
from layercache.runtime.surroundings import MODEL_CHANGES, PIPELINE_CHANGES, Loops
from layercache.runtime.timing import Clock
from layercache.runtime.trace import Trace

OnMismatch = Literal["error", "compute"]


class PlanRun:
    """A plan that is on a pipeline. Made by `apply_plan`; use it in `with`, or call `remove`.

    It holds for one thread at a time, as diffusers pipelines do.
    """

    def __init__(
        self, pipe: Any, component: str, plan: Plan, adapter: Adapter, on_mismatch: OnMismatch
    ) -> None:
        self.plan = plan
        self._pipe, self._component, self._on_mismatch = pipe, component, on_mismatch
        self._transformer: nn.Module = getattr(pipe, component)
        self._scheduler = pipe.scheduler
        self._clock = Clock()
        self._position = Position(self._scheduler, plan.sigmas)
        self._record = Record()
        self._root = Gate(self._transformer, self._forward)
        self._gates: list[Gate] = [self._root]
        self._undo: list[Callable[[], None]] = []
        unit = plan.step_unit
        self._step_runner = (
            StepRunner(plan.schedules[unit.name], self._note) if unit is not None else None
        )
        self._groups: list[GroupRunner] = []
        self._blocks: dict[str, list[nn.Module]] = {}
        for group in plan.groups:
            self._add_group(group.name, adapter, str(group.block_list), group.start, group.stop)
        names = sorted({str(group.block_list) for group in plan.groups})
        self._trace = Trace(self._transformer, adapter, names) if names else None
        self._controlled = False
        self._signatures: dict[Branch, tuple[Any, ...]] = {}
        self._answered: set[Branch] = set()
        self._computed: set[Branch] = set()
        self._loops = Loops(self._position.resume, self._end)
        # Steps that the scheduler made in a run in which this transformer was not called yet.
        self._unclaimed: tuple[Any, set[int]] = (None, set())
        self._warned: set[str] = set()

    def _add_group(
        self, name: str, adapter: Adapter, block_list: str, start: int | None, stop: int | None
    ) -> None:
        declared = adapter.block_list(block_list)
        span = (start or 0, stop or 0)
        schedule = self.plan.schedules[name]
        runner = GroupRunner(name, declared, schedule, span, self._note, self._clock)
        blocks = blocks_of(self._transformer, declared)
        self._groups.append(runner)
        self._blocks[name] = blocks
        for position in runner.positions:
            handler = runner.handler(blocks[position], position)
            self._gates.append(Gate(blocks[position], handler, declared.streams))

    # -- putting on and taking off -------------------------------------------------------------

    def install(self) -> None:
        """Put the plan on; on any error everything is as before."""
        try:
            for gate in self._gates:
                self._undo.append(gate.remove)
                gate.install()
            self._undo.append(tap_step(self._scheduler, self._guided))
            module = unwrap(self._transformer)
            self._wrap(module, "cache_context", self._listening)
            self._wrap(module, "enable_cache", self._refusing)
            self._wrap(self._pipe, "progress_bar", self._loops.opened)
            for name in MODEL_CHANGES:
                self._wrap(module, name, self._flushing)
            for name in PIPELINE_CHANGES:
                self._wrap(self._pipe, name, self._flushing)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take the plan off and free everything. A second call does nothing."""
        while self._undo:
            self._undo.pop()()
        self._end()
        self._signatures.clear()
        self._trace = None

    @property
    def active(self) -> bool:
        """Whether the plan is on the pipeline."""
        return bool(self._undo)

    def __enter__(self) -> Self:
        if not self.active:
            raise LayerCacheError(
                "this plan was taken off the pipeline, which would run in full: call apply_plan "
                "again for another with block"
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def _wrap(self, owner: Any, name: str, function: Function) -> None:
        if getattr(owner, name, None) is not None:
            self._undo.append(wrap_method(owner, name, function))

    @contextmanager
    def _listening(self, inner: Call, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        position = self._position
        outer = position.context, position.told
        position.context, position.told = name, kwargs.get("step_index")
        try:
            with inner(name, *args, **kwargs):
                yield
        finally:
            position.context, position.told = outer

    def _flushing(self, inner: Call, *args: Any, **kwargs: Any) -> Any:
        self._flush()
        return inner(*args, **kwargs)

    def _refusing(self, inner: Call, *args: Any, **kwargs: Any) -> Any:
        raise LayerCacheError(
            f"a plan is on this {type(self._transformer).__name__}, so that another cache would "
            "store what was predicted: remove the plan first"
        )

    # -- the root of the transformer -----------------------------------------------------------

    def _forward(self, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.is_grad_enabled():
            self._warn("gradients are enabled, so the model is computed in full: use torch.no_grad")
            return inner(*args, **kwargs)
        try:
            step = self._locate()
            if step is None:
                return inner(*args, **kwargs)
            return self._planned(step, inner, args, kwargs)
        except BaseException as error:
            for group in self._groups:
                group.cancel()
            self._end()
            if isinstance(error, UnsupportedModelError):
                # The model is not what its adapter says.
                self.remove()
            raise

    def _planned(
        self, step: int, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        branch = self._position.branch()
        shapes = signature(args, kwargs)
        if self._signatures.setdefault(branch, shapes) != shapes:
            self._signatures[branch] = shapes
            self._note("inputs changed shape, dtype or device within a run")
            self._flush(branch)
        record, clock, runner = self._record, self._clock, self._step_runner
        record.held(self._held_bytes())
        clock.follow(device_of(args, kwargs))
        start = clock.mark()
        if runner is not None:
            answer = runner.answer(step, branch)
            if answer is not None:
                self._answered.add(branch)
                record.count(STEP, branch, False, start, clock.mark())
                return answer
        self._computed.add(branch)
        for group in self._groups:
            group.begin(step, branch)
        # The first forward shows whether the adapter is right.
        with self._trace.watching() if self._trace is not None else nullcontext():
            output = inner(*args, **kwargs)
        self._trace = None
        for group in self._groups:
            computed = group.end()
            if computed is not None:
                record.count(group.name, branch, computed, *group.marks)
        if runner is not None:
            record.count(STEP, branch, True, start, clock.mark())
            runner.computed(step, branch, output)
        return output

    def _locate(self) -> int | None:
        """The plan's step of this call, or None where the plan does not apply."""
        self._check_parts()
        position = self._position
        found = position.advance()
        if found is None:
            return None
        begins, index = found
        if begins:
            self._begin_run()
        step = index + position.offset
        if not self._controlled or step >= self.plan.num_steps:
            return None
        if step != position.step:
            self._begin_step(step)
        return step

    def _check_parts(self) -> None:
        for what, now, then in (
            ("scheduler", self._pipe.scheduler, self._scheduler),
            (self._component, getattr(self._pipe, self._component, None), self._transformer),
        ):
            if now is not then:
                raise ModelMismatchError(
                    f"the pipeline's {what} was replaced while a plan was on it: remove the plan, "
                    "then apply it again"
                )

    def _begin_run(self) -> None:
        self._flush()
        for gate in self._gates:
            # A block that was compiled after the plan was put on has displaced its gate.
            gate.install()
        for group in self._groups:
            group.begin_run(self._blocks[group.name])
        if self._step_runner is not None:
            self._step_runner.begin_run()
        self._signatures.clear()
        self._loops.follow()
        self._record = Record(self._record.runs + 1)
        self._position.begin()
        self._controlled = self._matches(sigmas_of(self._scheduler))
        sigmas, steps = self._unclaimed
        if sigmas is self._scheduler.sigmas:
            self._record.steps_elsewhere |= steps
        self._unclaimed = (None, set())

    def _matches(self, sigmas: tuple[float, ...]) -> bool:
        self._position.offset, what = compare_sigmas(self.plan.sigmas, sigmas)
        if what is None:
            return True
        if self._on_mismatch == "error":
            raise ModelMismatchError(
                f"this run follows another noise schedule than the plan: {what}. Run with the "
                "plan's step count, shift and resolution, compile a plan for this schedule, or "
                'pass on_mismatch="compute" to compute such runs in full'
            )
        self._note(f"another noise schedule: {what}")
        self._warn(f"this run is computed in full: {what}")
        return False

    def _begin_step(self, step: int) -> None:
        before = self._position.step
        if before >= 0:
            self._finish_step(before)
            if any(s not in self._record.steps_elsewhere for s in range(before + 1, step)):
                # What is stored may belong to other steps than those that it was stored for: a
                # scheduler that finds its own starting point tells it only after its first step.
                self._note(f"the run jumped from step {before} to step {step}")
                self._flush()
        self._position.enter(step)
        self._record.steps_seen.add(step)
        self._answered.clear()
        self._computed.clear()

    def _finish_step(self, step: int) -> None:
        for group in self._groups:
            group.finish_step(step)
        if self._step_runner is not None:
            self._step_runner.finish_step(step)

    # -- the scheduler's step ------------------------------------------------------------------

    def _guided(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        del sample
        self._check_root()
        position, record = self._position, self._record
        called = position.under_way and bool(self._answered or self._computed)
        position.stepped()
        if not called:
            self._stepped_elsewhere(index)
            return velocity
        result, step = velocity, position.step
        if self._step_runner is not None:
            record.velocity_bytes = velocity.nbytes
            result = self._step_runner.guided(
                step, velocity, frozenset(self._answered), frozenset(self._computed)
            )
        record.held(self._held_bytes())
        self._finish_step(step)
        self._answered.clear()
        self._computed.clear()
        record.stepped()
        if step == self.plan.num_steps - 1:
            self._warn_of_differences()
        return result

    def _stepped_elsewhere(self, index: int) -> None:
        """Another model of the pipeline made this step: an expert's plan has nothing to do here."""
        if not self._position.under_way:
            sigmas, steps = self._unclaimed
            if sigmas is not self._scheduler.sigmas:
                steps = set()
            self._unclaimed = (self._scheduler.sigmas, steps | {index})
        elif self._controlled:
            step = index + self._position.offset
            self._record.steps_elsewhere.add(step)
            self._finish_step(step)

    def _check_root(self) -> None:
        """`torch.compile` of the whole transformer takes the place of the gate at its root."""
        if vars(self._transformer).get("_compiled_call_impl") is self._root:
            return
        if self.plan.groups and is_compiled(self._transformer):
            raise UnsupportedModelError(
                f"the {type(self._transformer).__name__} was compiled as a whole while a plan was "
                "on it: compile its blocks instead, with "
                "layercache.runtime.compile_blocks(transformer)"
            )
        self._root.install()

    # -- bookkeeping ---------------------------------------------------------------------------

    def _end(self) -> None:
        """The run under way, if any, is over; what follows starts from nothing."""
        self._position.end()
        self._answered.clear()
        self._computed.clear()
        self._flush()

    def _held_bytes(self) -> int:
        held = sum(group.held_bytes for group in self._groups)
        return held + (self._step_runner.held_bytes if self._step_runner is not None else 0)

    def _flush(self, branch: Branch | None = None) -> None:
        for group in self._groups:
            group.flush(branch)
        if self._step_runner is not None:
            self._step_runner.flush(branch)

    def _note(self, problem: str) -> None:
        self._record.problems[problem] += 1

    def _warn(self, message: str, detail: str = "") -> None:
        if message not in self._warned:
            self._warned.add(message)
            text = f"{message}: {detail}" if detail else message
            warnings.warn(f"LayerCache: {text}", stacklevel=2)

    def _warn_of_differences(self) -> None:
        report = self._record.report(self.plan, self._groups, self._step_runner, timed=False)
        if report.warnings:
            self._warn("a run differed from its plan; report() tells how", report.warnings[0])

    def report(self) -> RunReport:
        """What the latest run did, next to what the plan said."""
        return self._record.report(self.plan, self._groups, self._step_runner)
