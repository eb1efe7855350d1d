"""The controller: knows the step and the branch of every transformer call, and directs the units.

Decisions are made once per forward, at the root, from the plan alone. They never depend on data,
so that processes of one parallel run agree without talking to each other.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from layercache.errors import ModelMismatchError
from layercache.models.adapters import Adapter, blocks_of, unwrap
from layercache.models.stepping import sigmas_of, step_index, tap_step
from layercache.plan import Plan
from layercache.runtime.arithmetic import signature
from layercache.runtime.gates import Call, Gate
from layercache.runtime.groups import Branch, GroupRunner
from layercache.runtime.report import RunReport, UnitReport
from layercache.runtime.steps import StepRunner

SIGMA_TOLERANCE = 1e-4

OnMismatch = Literal["error", "compute"]

# Methods of diffusers' PEFT mixin after which stored tensors belong to another model.
_ADAPTER_METHODS = (
    "add_adapter",
    "delete_adapters",
    "disable_adapters",
    "disable_lora",
    "enable_adapters",
    "enable_lora",
    "fuse_lora",
    "load_lora_adapter",
    "set_adapter",
    "set_adapters",
    "unfuse_lora",
    "unload_lora",
)


class PlanRun:
    """A plan that is on a pipeline. Made by `apply_plan`; use it in `with`, or call `remove`.

    It holds for one thread at a time, as diffusers pipelines do.
    """

    def __init__(
        self, pipe: Any, component: str, plan: Plan, adapter: Adapter, on_mismatch: OnMismatch
    ) -> None:
        self.plan = plan
        self._pipe, self._on_mismatch = pipe, on_mismatch
        self._transformer: nn.Module = getattr(pipe, component)
        self._scheduler = pipe.scheduler
        self._groups: list[GroupRunner] = []
        self._gates: list[Gate] = [Gate(self._transformer, self._forward)]
        self._undo: list[Callable[[], None]] = []
        unit = plan.step_unit
        self._step_runner = (
            StepRunner(plan.schedules[unit.name], self._note) if unit is not None else None
        )
        for group in plan.groups:
            self._add_group(group.name, adapter, str(group.block_list), group.start, group.stop)
        # Where the run stands.
        self._sigmas: Any = None
        self._controlled = False
        self._offset = 0
        self._step = -1
        self._steps_done = 0
        self._context: str | None = None
        self._ordinals: Counter[str | None] = Counter()
        self._signatures: dict[Branch, tuple[Any, ...]] = {}
        self._answered: set[Branch] = set()
        self._computed: set[Branch] = set()
        # What the latest run did.
        self._runs = 0
        self._seen: dict[str, dict[bool, Counter[Branch]]] = {}
        self._steps_seen: set[int] = set()
        self._problems: Counter[str] = Counter()
        self._peak_bytes = 0
        self._velocity_bytes = 0
        self._output_bytes = 0
        self._started = self._ended = 0.0
        self._warned: set[str] = set()

    def _add_group(
        self, name: str, adapter: Adapter, block_list: str, start: int | None, stop: int | None
    ) -> None:
        declared = adapter.block_list(block_list)
        first, last = start or 0, stop or 0
        runner = GroupRunner(name, declared, self.plan.schedules[name], self._note)
        self._groups.append(runner)
        if not runner.gated:
            return
        blocks = blocks_of(self._transformer, declared)
        for position in range(first, last):
            block = blocks[position]
            self._gates.append(Gate(block, runner.handler(block, position)))

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
            for name in _ADAPTER_METHODS:
                self._wrap(module, name, self._flushing)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take the plan off and free everything. A second call does nothing."""
        while self._undo:
            self._undo.pop()()
        self._flush()
        self._signatures.clear()
        self._sigmas = None

    @property
    def active(self) -> bool:
        """Whether the plan is on the pipeline."""
        return bool(self._undo)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def _wrap(self, module: nn.Module, name: str, wrapper: Callable[[Call], Call]) -> None:
        original = getattr(module, name, None)
        if original is None:
            return
        own = name in vars(module)
        replacement = wrapper(original)
        vars(module)[name] = replacement

        def undo() -> None:
            if vars(module).get(name) is replacement:
                del vars(module)[name]
                if own:
                    vars(module)[name] = original

        self._undo.append(undo)

    def _listening(self, original: Call) -> Call:
        @contextmanager
        def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
            outer, self._context = self._context, name
            try:
                with original(name, *args, **kwargs):
                    yield
            finally:
                self._context = outer

        return cache_context

    def _flushing(self, original: Call) -> Call:
        def changing_adapters(*args: Any, **kwargs: Any) -> Any:
            self._flush()
            return original(*args, **kwargs)

        return changing_adapters

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
        except BaseException:
            # The run is broken; what follows, if anything, starts from nothing.
            for group in self._groups:
                group.cancel()
            self._flush()
            self._sigmas, self._step = None, -1
            raise

    def _planned(
        self, step: int, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        branch: Branch = (self._context, self._ordinals[self._context])
        self._ordinals[self._context] += 1
        shapes = signature(args, kwargs)
        if self._signatures.setdefault(branch, shapes) != shapes:
            self._signatures[branch] = shapes
            self._note("inputs changed shape, dtype or device within a run")
            self._flush(branch)
        self._peak_bytes = max(self._peak_bytes, self._held_bytes())
        runner = self._step_runner
        if runner is not None:
            answer = runner.answer(step, branch)
            if answer is not None:
                self._answered.add(branch)
                self._count("step", False, branch)
                return answer
            self._count("step", True, branch)
        self._computed.add(branch)
        for group in self._groups:
            group.begin(step, branch)
        output = inner(*args, **kwargs)
        for group in self._groups:
            computed = group.end()
            if computed is not None:
                self._count(group.name, computed, branch)
        if runner is not None:
            runner.computed(step, branch, output)
            self._output_bytes = max(self._output_bytes, runner.output_bytes)
        return output

    def _locate(self) -> int | None:
        """The plan's step of this call, or None where the plan does not apply."""
        scheduler = self._scheduler
        if self._pipe.scheduler is not scheduler:
            raise ModelMismatchError(
                "the pipeline's scheduler was replaced while a plan was on it: remove the plan, "
                "then apply it again"
            )
        index = self._steps_done
        if hasattr(scheduler, "_step_index"):
            index = step_index(scheduler)
        # A scheduler makes new sigmas for every run, also after a run that was broken off.
        if scheduler.sigmas is not self._sigmas or index + self._offset < self._step:
            self._begin_run()
            index = step_index(scheduler) if hasattr(scheduler, "_step_index") else 0
        step = index + self._offset
        if not self._controlled or step >= self.plan.num_steps:
            return None
        if step != self._step:
            self._begin_step(step)
        return step

    def _begin_run(self) -> None:
        self._flush()
        for gate in self._gates:
            # A block that was compiled after the plan was put on has displaced its gate.
            gate.install()
        for group in self._groups:
            group.bytes_per_refresh.clear()
        self._signatures.clear()
        self._sigmas = self._scheduler.sigmas
        self._step, self._steps_done = -1, 0
        self._runs += 1
        self._seen, self._steps_seen, self._problems = {}, set(), Counter()
        self._peak_bytes = self._velocity_bytes = self._output_bytes = 0
        self._started = self._ended = time.perf_counter()
        self._controlled = self._matches(sigmas_of(self._scheduler))

    def _matches(self, sigmas: tuple[float, ...]) -> bool:
        mine = self.plan.sigmas
        # An image-to-image pipeline may hand over only the last part of the schedule.
        self._offset = max(len(mine) - len(sigmas), 0)
        tail = mine[self._offset :]
        worst = max((abs(a - b) for a, b in zip(tail, sigmas, strict=False)), default=float("inf"))
        if len(tail) == len(sigmas) > 1 and worst <= SIGMA_TOLERANCE:
            return True
        what = (
            f"it has {len(sigmas) - 1} steps and the plan {len(mine) - 1}"
            if len(sigmas) != len(mine)
            else f"its sigmas differ from the plan's by up to {worst:.4g}"
        )
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
        if self._step >= 0:
            self._finish_step(self._step)
        self._step = step
        self._steps_seen.add(step)
        self._ordinals.clear()
        self._answered.clear()
        self._computed.clear()

    def _finish_step(self, step: int) -> None:
        for group in self._groups:
            group.finish_step(step)
        if self._step_runner is not None:
            self._step_runner.finish_step(step)

    # -- the scheduler's step ------------------------------------------------------------------

    def _guided(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        del index, sample
        self._steps_done += 1
        step = self._step
        if step < 0 or not (self._answered or self._computed):
            # Another transformer of the pipeline, or a run that the plan does not control.
            return velocity
        result = velocity
        if self._step_runner is not None:
            self._velocity_bytes = velocity.nbytes
            result = self._step_runner.guided(
                step, velocity, frozenset(self._answered), frozenset(self._computed)
            )
        self._peak_bytes = max(self._peak_bytes, self._held_bytes())
        self._finish_step(step)
        self._ordinals.clear()
        self._answered.clear()
        self._computed.clear()
        self._ended = time.perf_counter()
        return result

    # -- bookkeeping ---------------------------------------------------------------------------

    def _held_bytes(self) -> int:
        held = sum(group.held_bytes for group in self._groups)
        return held + (self._step_runner.held_bytes if self._step_runner is not None else 0)

    def _flush(self, branch: Branch | None = None) -> None:
        for group in self._groups:
            group.flush(branch)
        if self._step_runner is not None:
            self._step_runner.flush(branch)

    def _count(self, unit: str, computed: bool, branch: Branch) -> None:
        seen = self._seen.setdefault(unit, {True: Counter(), False: Counter()})
        seen[computed][branch] += 1

    def _note(self, problem: str) -> None:
        self._problems[problem] += 1

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"LayerCache: {message}", stacklevel=2)

    def report(self) -> RunReport:
        """What the latest run did, next to what the plan said."""
        plan = self.plan
        units = []
        for unit in plan.units:
            schedule = plan.schedules[unit.name]
            seen = self._seen.get(unit.name, {True: Counter(), False: Counter()})
            branches = sorted({*seen[True], *seen[False]}, key=lambda b: (b[0] or "", b[1]))
            units.append(
                UnitReport(
                    name=unit.name,
                    planned_computed=sum(schedule.refresh),
                    planned_predicted=sum(schedule.cached),
                    seen_computed={_label(b): seen[True][b] for b in branches},
                    seen_predicted={_label(b): seen[False][b] for b in branches},
                )
            )
        sizes = {g.name: sum(g.bytes_per_refresh.values()) for g in self._groups}
        return RunReport(
            steps_planned=plan.num_steps,
            steps_seen=len(self._steps_seen),
            units=tuple(units),
            cache_bytes_planned=plan.cache_bytes(sizes, self._velocity_bytes, self._output_bytes),
            cache_bytes_predicted=plan.predicted.cache_bytes,
            cache_bytes_seen=self._peak_bytes,
            seconds=self._ended - self._started,
            runs=self._runs,
            problems=dict(self._problems),
        )


def _label(branch: Branch) -> str:
    name, ordinal = branch
    if name is None:
        return f"call {ordinal}"
    return name if ordinal == 0 else f"{name} {ordinal}"
