"""`PlanRun`: a plan that is on a pipeline, and whose calls of the transformer it answers.

A transformer may serve pipelines besides the one that the plan was put on. Each call is of its
caller (`models.calling`), and the caller's *scheduler* decides: the plan's own scheduler has the
plan's session; a copy of the pipeline, made while the plan is on, has a session for its scheduler;
every other pipeline is computed in full, whatever run it is called from.
"""

from __future__ import annotations

import re
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import nn

from layercache.errors import LayerCacheError, ModelMismatchError, UnsupportedModelError
from layercache.models._foreign import CALL_SLOT
from layercache.models.adapters import Adapter, timeless_blocks, unwrap
from layercache.models.calling import calling_pipeline
from layercache.models.gates import Call, Gate, is_compiled
from layercache.models.patching import Function, own_methods, wrap_method, wrappers
from layercache.models.pipelines import loop_owners
from layercache.plan import Plan
from layercache.runtime._groups import gate_positions
from layercache.runtime._report import RunReport
from layercache.runtime._session import OnMismatch, Session
from layercache.runtime._surroundings import MODEL_CHANGES, PIPELINE_CHANGES, Loops
from layercache.runtime._trace import Trace
from layercache.runtime._units import placed


class _Mark:
    """Stands in the dictionary of a pipeline or scheduler that has a session.

    A shallow copy takes it over, a deep one does not.
    """

    def __init__(self, session: Session) -> None:
        self.session = session

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class _Context(threading.local):
    """What holds for the call under way in this thread."""

    session: Session | None = None
    name: str | None = None
    told: int | None = None
    off: bool = False


class PlanRun:
    """A plan that is on a pipeline. Made by `apply_plan`; use it in `with`, or call `remove`.

    Shallow copies that are made of the pipeline meanwhile, with schedulers of their own, run the
    plan too, in threads of their own if need be.
    """

    def __init__(
        self,
        pipe: Any,
        component: str,
        plans: Sequence[Plan],
        adapter: Adapter,
        on_mismatch: OnMismatch,
    ) -> None:
        self.plans = tuple(plans)
        self.component, self.adapter, self.on_mismatch = component, adapter, on_mismatch
        self.transformer: nn.Module = getattr(pipe, component)
        self.context = _Context()
        self.loops = Loops()
        self.main = Session(self, pipe)
        self._pipe = pipe
        self._latest = self.main
        # A copy's session lives as long as the copy's scheduler, which holds it.
        self._sessions: list[weakref.ref[Session]] = []
        self._mark = f"_layercache_{component}"
        self._root = Gate(self.transformer, self._forward)
        self._gates: list[Gate] = [self._root]
        streams: dict[nn.Module, Sequence[str]] = {}
        for each in self.plans:
            for group, declared, blocks in placed(each, self.transformer, adapter):
                for position in gate_positions(group, each.schedules[group.name]):
                    streams[blocks[position]] = declared.streams
        for block in timeless_blocks(self.transformer, adapter):
            streams[block] = ()
        self._gates += [Gate(block, partial(self._block, block), s) for block, s in streams.items()]
        names = sorted({str(group.block_list) for plan in self.plans for group in plan.groups})
        self._trace = Trace(self.transformer, adapter, names) if names else None
        self._tracing = threading.Lock()
        self._undo: list[Callable[[], None]] = []
        self._runs = 0
        self._others: Counter[str] = Counter()
        self._said: set[str] = set()

    # -- putting on and taking off -------------------------------------------------------------

    def install(self) -> None:
        """Put the plan on; on any error everything is as before."""
        try:
            for gate in self._gates:
                self._undo.append(gate.remove)
                gate.install()
            self._add(self.main)
            module = unwrap(self.transformer)
            self._wrap(module, "cache_context", self._listening)
            self._wrap(module, "enable_cache", self._refusing)
            for name in MODEL_CHANGES:
                self._wrap(module, name, self._flushing)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take the plan off and free everything. A second call does nothing."""
        while self._undo:
            self._undo.pop()()
        for session in self._live:
            session.remove()
            for owner in (session.pipe, session.scheduler):
                vars(owner).pop(self._mark, None)
        self._trace = None

    @property
    def plan(self) -> Plan:
        """The plan; of several, that of the latest run."""
        return self._latest.plan

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

    def __exit__(self, *error: object) -> None:
        self.remove()

    def watch(self, pipe: Any) -> list[Callable[[], None]]:
        """Notice when a pipeline's loop is left or its model changes; returns what undoes it."""
        wanted: list[tuple[Any, str, Function]] = [
            (owner, "progress_bar", self.loops.opened) for owner in loop_owners(pipe)
        ]
        wanted += [(pipe, name, self._flushing) for name in PIPELINE_CHANGES]
        return [
            wrap_method(owner, name, function)
            for owner, name, function in wanted
            if getattr(owner, name, None) is not None
            # A copy of a modular pipeline has the same blocks.
            and all(wrapper.function != function for wrapper in wrappers(owner, name))
        ]

    def _wrap(self, owner: Any, name: str, function: Function) -> None:
        if getattr(owner, name, None) is not None:
            self._undo.append(wrap_method(owner, name, function))

    @contextmanager
    def _listening(self, inner: Call, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        context = self.context
        outer = context.name, context.told
        context.name, context.told = name, kwargs.get("step_index")
        try:
            with inner(name, *args, **kwargs):
                yield
        finally:
            context.name, context.told = outer

    def _flushing(self, inner: Call, *args: Any, **kwargs: Any) -> Any:
        for session in self._live:
            session.units.flush()
        return inner(*args, **kwargs)

    def _refusing(self, inner: Call, *args: Any, **kwargs: Any) -> Any:
        raise LayerCacheError(
            f"a plan is on this {type(self.transformer).__name__}, so that another cache would "
            "store what was predicted: remove the plan first"
        )

    # -- calls of the transformer and of its blocks --------------------------------------------

    def _forward(self, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.context.off:
            return inner(*args, **kwargs)
        if torch.is_grad_enabled():
            self.warn("gradients are enabled, so the model is computed in full: use torch.no_grad")
            return inner(*args, **kwargs)
        caller = calling_pipeline(self.transformer)
        session = self._session_of(caller)
        context = self.context
        outer, context.session = context.session, session
        try:
            if session is None:
                return inner(*args, **kwargs)
            return session.forward(caller, inner, args, kwargs)
        except BaseException as error:
            if session is not None:
                session.failed()
                if isinstance(error, UnsupportedModelError):
                    # The model is not what its adapter says.
                    self.remove()
            raise
        finally:
            context.session = outer

    def _session_of(self, caller: Any) -> Session | None:
        main = self.main
        if caller is None or caller is self._pipe:
            self._check_parts()
            return main
        scheduler = caller.scheduler
        if scheduler is main.scheduler:
            return main
        mark = vars(scheduler).get(self._mark)
        if isinstance(mark, _Mark) and mark.session.run is self:
            if mark.session.scheduler is scheduler:
                return mark.session
            # A shallow copy, whose step is that of the scheduler that it was copied from.
            own_methods(scheduler)
        mark = vars(caller).get(self._mark)
        if isinstance(mark, _Mark) and mark.session.run is self:
            return self._add(Session(self, caller))
        self._others[type(caller).__name__] += 1
        self.warn(
            f"another pipeline, a {type(caller).__name__} with a scheduler of its own, uses this "
            f"{type(self.transformer).__name__}: its runs are computed in full. A copy.copy of the "
            "pipeline that the plan is on, made under the plan, runs the plan"
        )
        return None

    def _add(self, session: Session) -> Session:
        self._sessions = [*(ref for ref in self._sessions if ref()), weakref.ref(session)]
        session.install()
        for owner in (session.pipe, session.scheduler):
            vars(owner)[self._mark] = _Mark(session)
        return session

    @property
    def _live(self) -> list[Session]:
        return [session for ref in self._sessions if (session := ref()) is not None]

    def _check_parts(self) -> None:
        for what, now, then in (
            ("scheduler", self._pipe.scheduler, self.main.scheduler),
            (self.component, getattr(self._pipe, self.component, None), self.transformer),
        ):
            if now is not then:
                raise ModelMismatchError(
                    f"the pipeline's {what} was replaced while a plan was on it: remove the plan, "
                    "then apply it again"
                )

    def _block(
        self, block: nn.Module, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A call of a block, which may be of no group, or of one of another plan of the set."""
        session = self.context.session
        handler = None if session is None else session.units.handlers.get(block)
        return inner(*args, **kwargs) if handler is None else handler(inner, args, kwargs)

    # -- what sessions ask for -----------------------------------------------------------------

    def begins(self, session: Session) -> None:
        """A run begins: it is the one that is reported."""
        self._latest = session
        for gate in self._gates:
            # A block that was compiled after the plan was put on has displaced its gate.
            gate.install()

    def count(self) -> int:
        """The number of the run that begins."""
        self._runs += 1
        return self._runs

    def traced(self, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a forward; the first shows whether the adapter is right."""
        if self._trace is not None:
            with self._tracing:
                trace, self._trace = self._trace, None
                if trace is not None:
                    with trace.watching():
                        return inner(*args, **kwargs)
        return inner(*args, **kwargs)

    def check_root(self) -> None:
        """`torch.compile` of the whole transformer takes the place of the gate at its root."""
        if vars(self.transformer).get(CALL_SLOT) is self._root:
            return
        if any(plan.groups for plan in self.plans) and is_compiled(self.transformer):
            raise UnsupportedModelError(
                f"the {type(self.transformer).__name__} was compiled as a whole while a plan was "
                "on it: compile its blocks instead, with "
                "layercache.runtime.compile_blocks(transformer)"
            )
        self._root.install()

    def warn(self, message: str) -> None:
        """Warn, once, of what is the same but for numbers."""
        if self.new([message]):
            warnings.warn(f"LayerCache: {message}", stacklevel=2)

    def new(self, messages: Iterable[str]) -> list[str]:
        """Those that were not said before, but for their numbers; they are said from now on."""
        fresh = []
        for message in messages:
            kind = re.sub(r"[\d.]+", "0", message)
            if kind not in self._said:
                self._said.add(kind)
                fresh.append(message)
        return fresh

    def warn_of(self, report: RunReport) -> None:
        """One warning of all that a run found otherwise than planned, and that is new."""
        if new := self.new(report.warnings):
            warnings.warn(
                f"LayerCache: a run differed from its plan; report() tells how: {'; '.join(new)}",
                stacklevel=2,
            )

    # -- for users -----------------------------------------------------------------------------

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within it, the calls of this thread are computed in full, as without a plan.

        Example:
            >>> with run.off():  # doctest: +SKIP
            ...     reference = pipe("a large red circle").images[0]
        """
        context = self.context
        outer, context.off = context.off, True
        try:
            yield
        finally:
            context.off = outer

    @property
    def held_bytes(self) -> int:
        """Bytes of all tensors that the plan holds now."""
        return sum(session.units.held_bytes for session in self._live)

    def report(self) -> RunReport:
        """What the latest run did, next to what the plan said."""
        return self._latest.report(self._others)
