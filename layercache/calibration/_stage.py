"""A pipeline whose model calls and scheduler steps pass through a director.

The pipeline's loop, its guidance and its scheduler are its own in every run. What a director may
change is what a transformer call returns and what the scheduler makes of a step; with a director
that changes nothing, a run is the plain one bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from layercache.calibration.prompts import Batch, noise_seed
from layercache.errors import UnsupportedModelError
from layercache.models.gates import Call, Gate, gate_of, is_compiled
from layercache.models.patching import wrap_method
from layercache.models.pipelines import components_of, free_models, run_pipeline
from layercache.models.stepping import moved_sample, with_sample

Move = Callable[[Tensor, Tensor], Tensor]
"""(velocity, sample) to the sample that the pipeline's own scheduler makes of them."""
Others = Literal["run", "note", "answer"]


@dataclass(frozen=True)
class At:
    """Where a run stands: the call of this number within this step is this component's."""

    component: str
    step: int
    number: int


class Director(Protocol):
    """Decides what calls and steps give."""

    known: int
    """Steps below it are answered without the model, so the other models may be as well."""

    def called(self, at: At, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a transformer call returns."""
        ...

    def stepped(self, step: int, velocity: Tensor, sample: Tensor, move: Move) -> Tensor:
        """The sample after a step; may raise `Over`."""
        ...


class Over(BaseException):
    """The rest of the pipeline's call is not needed.

    No `Exception`, so that nothing between here and the pipeline's caller takes it for a failure.
    """


class Stage:
    """Gates on a pipeline's models. `play` runs it; `remove` takes them off.

    Every other model of the pipeline (text encoders, autoencoders, ControlNets) can be *noted* in
    one run and *answer* from that in the next: those before the loop call by call, those within it,
    whose outputs only the transformer reads, with what they gave first.

    Args:
        pipe: The pipeline.
        components: The transformers that are calibrated.

    Raises:
        UnsupportedModelError: A component is no module, or something is on it already.
    """

    def __init__(self, pipe: Any, components: Sequence[str]) -> None:
        self.pipe = pipe
        modules = components_of(pipe)
        for name in components:
            if not isinstance(modules.get(name), nn.Module):
                raise UnsupportedModelError(
                    f"{type(pipe).__name__} has no model {name!r}: component= names one of "
                    + ", ".join(sorted(modules))
                )
            if is_compiled(modules[name]) or gate_of(modules[name]) is not None:
                raise UnsupportedModelError(
                    f"this {type(modules[name]).__name__} is compiled as a whole, or a plan is on "
                    "it: calibrate before compiling, compile its blocks alone "
                    "(layercache.runtime.compile_blocks), or remove the plan"
                )
        self.step = self.number = 0
        self._started = False
        self._director: Director | None = None
        self._others: Others = "run"
        self._noted: dict[tuple[str, int], Any] = {}
        self._counts: dict[str, int] = {}
        self._undo: list[Callable[[], None]] = []
        seen: set[int] = set()
        for name, module in modules.items():
            if id(module) in seen:
                continue
            seen.add(id(module))
            # Experts go by these names; their outputs decide the velocity as much as ours do.
            if name in components or name.startswith(("transformer", "unet")):
                self._install(Gate(module, self._denoiser(name)))
            else:
                self._install(Gate(module, self._other(name)))
                if callable(getattr(module, "encode", None)):
                    self._undo.append(wrap_method(module, "encode", self._encoder(name)))

    def _install(self, gate: Gate) -> None:
        gate.install()
        self._undo.append(gate.remove)

    def remove(self) -> None:
        """Take everything off, and drop what was noted."""
        while self._undo:
            self._undo.pop()()
        self._noted.clear()

    def play(self, batch: Batch, director: Director, others: Others = "run") -> Tensor | None:
        """Run the pipeline under a director.

        Args:
            batch: The prompts.
            director: What directs the run.
            others: What the pipeline's other models do: run, run and be noted, or answer.

        Returns:
            Its images, or None if the director ended the run.
        """
        self.step = self.number = 0
        self._started, self._others = False, others
        self._counts.clear()
        if others == "note":
            self._noted.clear()
        self._director = director
        try:
            with self._tapped():
                return run_pipeline(self.pipe, batch.arguments, seed=noise_seed(batch.ids[0]))
        except Over:
            free_models(self.pipe)
            return None
        finally:
            self._director = None

    # -- the models ----------------------------------------------------------------------------

    def _denoiser(self, name: str) -> Callable[..., Any]:
        def handle(inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._director is None:
                return inner(*args, **kwargs)
            self._started = True
            at = At(name, self.step, self.number)
            self.number += 1
            return self._director.called(at, inner, args, kwargs)

        return handle

    def _other(self, name: str) -> Callable[..., Any]:
        def handle(inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._remembered(name, inner, args, kwargs)

        return handle

    def _encoder(self, name: str) -> Callable[..., Any]:
        def encode(inner: Call, *args: Any, **kwargs: Any) -> Any:
            return self._remembered(f"{name}.encode", inner, args, kwargs)

        return encode

    def _remembered(
        self, name: str, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        director = self._director
        if director is None or self._others == "run":
            return inner(*args, **kwargs)
        count = self._counts.get(name, 0)
        self._counts[name] = count + 1
        key = (name, -1) if self._started else (name, count)
        if self._others == "answer":
            known = not self._started or self.step < director.known
            return self._noted[key] if known and key in self._noted else inner(*args, **kwargs)
        output = inner(*args, **kwargs)
        self._noted.setdefault(key, output)
        return output

    # -- the scheduler -------------------------------------------------------------------------

    @contextmanager
    def _tapped(self) -> Iterator[None]:
        restore = wrap_method(self.pipe.scheduler, "step", self._step)
        try:
            yield
        finally:
            restore()

    def _step(
        self,
        inner: Call,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        assert self._director is not None
        results = []

        def move(velocity: Tensor, sample: Tensor) -> Tensor:
            results.append(inner(velocity, timestep, sample, *args, **kwargs))
            return moved_sample(results[-1])

        try:
            found = self._director.stepped(self.step, model_output, sample, move)
        finally:
            self.number, self.step = 0, self.step + 1
        result = results[-1]
        return result if moved_sample(result) is found else with_sample(result, found)
