"""One genuine run of a pipeline, recorded: outputs of the calls, velocities, latents, replays.

The loop is untouched. At each transformer call the replays (group, lag) are computed on the spot
from that call's own arguments, and their outputs are kept. What the pipeline makes of them is read
later, when it runs again with its calls answered from what was kept (`reenact`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layercache.calibration._jobs import Jobs
from layercache.calibration._kept import Kept, Key
from layercache.calibration._replay import RecordedCall, ReplayableTransformer, Shape
from layercache.calibration._scheduler import check_scheduler, run_sigmas
from layercache.calibration._stage import At, Move, Stage
from layercache.errors import StatsError
from layercache.models._foreign import running_index
from layercache.models.gates import Call
from layercache.models.stepping import first_calls, levels, listed_sigmas, step_index
from layercache.models.tensors import tensor_bytes, tensors_in

Performers = Mapping[str, ReplayableTransformer]
"""The calibrated transformers, by component."""


@dataclass
class StepCalls:
    """The transformer calls of one step: whose, of which shapes, and how much work each was."""

    component: str = ""
    outputs: list[Shape] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)
    elements: list[tuple[int, ...]] = field(default_factory=list)
    output_bytes: int = 0
    group_bytes: tuple[int, ...] = ()


@dataclass
class Run:
    """What a recorded run did.

    Under Heun's method a step of the sampler is two of the scheduler's, each with its own calls of
    the model. Here, a step is one of the scheduler's; statistics are of those that begin one of the
    sampler's (`first`).

    Attributes:
        kept: Outputs of its calls and of their replays.
        sigmas: (T+1,) noise levels, falling to 0; that of a second call stands twice.
        calls: (T,) the calls of each step.
        velocities: (T,) the guided outputs, on the CPU.
        latents: (T+1,) what the scheduler received at each step, and the last that it made.
        primed: Whether the first step has to be computed again before later ones can be: the model
            keeps keys and values of it.
        left: After how many steps each element of the latent was left as the scheduler made it.
        missing: By how much each element moved less than a tenth of what its velocity says, beyond
            rounding.
    """

    kept: Kept
    sigmas: tuple[float, ...] = ()
    calls: list[StepCalls] = field(default_factory=list)
    velocities: list[Tensor] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    left: Tensor | None = None
    missing: Tensor | None = None
    primed: bool = False

    @property
    def steps(self) -> int:
        """T."""
        return len(self.velocities)

    def require_whole(self) -> None:
        """Raise `StatsError` unless the run took the steps that its schedule has."""
        if self.steps != len(self.sigmas) - 1:
            raise StatsError(
                f"the pipeline took {self.steps} steps of a schedule of {len(self.sigmas) - 1}: "
                "calibration needs a run that goes through its schedule once, to the end"
            )
        if self.passes > 1 and len({step.component for step in self.calls}) > 1:
            raise StatsError(
                "the scheduler calls the model twice a step, and models take turns: give the "
                "pipeline a scheduler with one call a step"
            )

    @property
    def first(self) -> list[int]:
        """The steps that begin a step of the sampler: all, or every other one."""
        return first_calls(self.sigmas)

    @property
    def passes(self) -> int:
        """How many steps a step of the sampler is; the last one is always one."""
        return 1 if len(self.first) == len(self.sigmas) - 1 else 2

    @property
    def levels(self) -> tuple[float, ...]:
        """The noise levels of the sampler's steps."""
        return levels(self.sigmas)

    @property
    def final(self) -> Tensor:
        """The latent after the last step."""
        return self.latents[-1]

    @functools.cached_property
    def mask(self) -> Tensor | float:
        """1 where an element of the latent is the model's to move, 0 elsewhere.

        Elsewhere it is the pipeline's own: an inpainted background, a given first frame.
        """
        if self.left is None or self.missing is None or self.steps < 2:
            return 1.0
        moved = torch.stack([velocity != 0 for velocity in self.velocities]).any(dim=0)
        live = (2 * self.left > self.steps - 1) & (self.missing <= 0) & moved
        return live.float() if bool(live.any()) else 1.0

    def displacement(self, step: int) -> Tensor:
        """What the sampler moved the live elements of the latent by."""
        moved: Tensor = (self.latents[step + 1] - self.latents[step]).float() * self.mask
        return moved

    def velocity(self, step: int) -> Tensor:
        """The guided output at the live elements, signed so that dz = v dsigma."""
        found: Tensor = self.velocities[step].float() * (self.mask * self.sign)
        return found

    @functools.cached_property
    def sign(self) -> float:
        """-1 for a model whose output points the other way (LTX's and Mochi's pipelines negate)."""
        along = sum(
            float((self.displacement(step) * self.velocities[step].float()).sum())
            * (self.sigmas[step + 1] - self.sigmas[step])
            for step in range(self.steps)
        )
        return -1.0 if along < 0 else 1.0

    def segments(self, component: str) -> NDArray[np.float64]:
        """(T,) numbers of the stretches over which a component is called alike."""
        shapes = [step.shapes if step.component == component else [] for step in self.calls]
        changes = [0, *(a != b for a, b in itertools.pairwise(shapes))]
        found: NDArray[np.float64] = np.cumsum(changes).astype(np.float64)
        return found

    def loads(self, component: str) -> NDArray[np.float64]:
        """(T, G+1) the work of each step as a share of the fullest, by group and for the rest."""
        width = max(len(e) for step in self.calls for e in step.elements if step.elements)
        table = np.zeros((self.steps, width))
        for index, step in enumerate(self.calls):
            if step.component == component:
                table[index] = np.sum(step.elements, axis=0)
        result: NDArray[np.float64] = table / np.maximum(table.max(axis=0), 1)
        return result


class Recorder:
    """Directs a run that is to be recorded.

    Args:
        stage: The pipeline.
        performers: The calibrated transformers.
        run: Gets what the run does.
        prompts: How many prompts the batch has.
        jobs: What is replayed at which step; None replays nothing.
        lags_together: Most lags that are replayed as one batch.
        computed: The transformer is computed at so many steps of each kind, and what it gave last
            answers the calls of the others; None computes all.
        on_step: Called with each step once it is recorded.
    """

    known = 0

    def __init__(
        self,
        stage: Stage,
        performers: Performers,
        run: Run,
        prompts: int,
        *,
        jobs: Jobs | None = None,
        lags_together: int = 1,
        computed: int | None = None,
        on_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.stage, self.performers, self.run, self.prompts = stage, performers, run, prompts
        self.jobs, self.lags_together, self.computed = jobs, lags_together, computed
        self.on_step = on_step
        self.batched: bool | None = None
        self._began: Any = None
        self._returned: Any = None
        self._made: Tensor | None = None
        self._epsilon = 0.0
        # Of calls of one kind, where what they gave is kept.
        self._known: dict[tuple[Any, ...], list[Key]] = {}

    # -- the transformer's calls ---------------------------------------------------------------

    def called(self, at: At, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute, record and replay a call, or answer it with what an earlier one gave."""
        if at.step == 0 and at.number == 0:
            check_scheduler(self.stage.pipe.scheduler)
            self.run.sigmas = run_sigmas(self.stage.pipe.scheduler)
            if self.run.passes > 1:
                self._require_no_groups()
        if at.number == 0:
            self.run.calls.append(StepCalls(component=at.component))
        step = self.run.calls[-1]
        if step.component != at.component:
            raise StatsError(
                f"both {step.component} and {at.component} are called at step {at.step}: only "
                "pipelines whose experts take turns can be calibrated"
            )
        if self.computed is None:
            output = self._performed(at, inner, args, kwargs)
        else:
            output = self._sampled(at, inner, args, kwargs)
        tensors = tensors_in(output)
        step.outputs.append(tuple(tensor.shape for tensor in tensors))
        self._epsilon = max(self._epsilon, *(torch.finfo(tensor.dtype).eps for tensor in tensors))
        self.run.kept.put((at.step, at.number, None), output)
        return output

    def _require_no_groups(self) -> None:
        if any(performer.groups for performer in self.performers.values()):
            raise StatsError(
                f"{type(self.stage.pipe.scheduler).__name__} calls the model twice a step, where "
                "only whole steps can be planned: leave groups out, or pass groups=0"
            )

    def _performed(self, at: At, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        performer = self.performers.get(at.component)
        if performer is None:
            return inner(*args, **kwargs)
        clock = performer.times.clock
        if at.number == 0:
            self._began = clock.mark()
            if self._returned is not None:
                performer.times.outside(self._returned, self._began)
        call = performer.record(at.step, at.number, inner, args, kwargs)
        started = clock.mark()
        step = self.run.calls[-1]
        step.shapes.append(call.shape)
        step.elements.append(call.elements)
        step.output_bytes += tensor_bytes(call.output)
        if self.jobs is not None:
            self._replay(self.jobs, performer, call)
        self.recorded(call, performer)
        performer.times.aside(started, clock.mark())
        return call.output

    def recorded(self, call: RecordedCall, performer: ReplayableTransformer) -> None:
        """A call was recorded; for subclasses."""

    def _replay(self, jobs: Jobs, performer: ReplayableTransformer, call: RecordedCall) -> None:
        wanted: dict[tuple[int, ...], list[int]] = {}
        for groups, lag in jobs.at(call.step):
            wanted.setdefault(groups, []).append(lag)
        for groups, asked in wanted.items():
            lags = performer.available(call, groups, asked)
            together = min(len(lags), self.lags_together)
            if together > 1 and self.batched is None:
                self.batched = performer.batches_repeat(call)
            size = together if self.batched else 1
            for start in range(0, len(lags), max(size, 1)):
                chunk = lags[start : start + size]
                for lag, output in zip(chunk, performer.replay(call, groups, chunk), strict=True):
                    self.run.kept.put((call.step, call.number, (groups, lag)), output)

    def _sampled(self, at: At, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = tensors_in([args, kwargs])
        kind = (at.component, at.number, tuple((t.shape, t.dtype) for t in given))
        seen = self._known.setdefault(kind, [])
        if len(seen) < (self.computed or 0):
            seen.append((at.step, at.number, None))
            return self._performed(at, inner, args, kwargs)
        return self.run.kept.get(seen[-1], given[0].device)

    # -- the scheduler's steps -----------------------------------------------------------------

    def stepped(self, step: int, velocity: Tensor, sample: Tensor, move: Move) -> Tensor:
        """Note a step, and let the pipeline's own scheduler make it."""
        run = self.run
        if len(run.calls) != step + 1:
            raise StatsError(
                f"the scheduler made {step + 1} steps and the transformer was called at "
                f"{len(run.calls)} of them: calibration needs a call at every step"
            )
        performer = self.performers.get(run.calls[-1].component)
        if performer is not None and self._began is not None:
            performer.times.outside(self._began, performer.times.clock.mark())
        self._check(step, velocity, sample)
        run.velocities.append(velocity.detach().to("cpu", copy=True))
        self._compare(sample)
        run.latents.append(sample.detach().to("cpu", copy=True))
        drawn = torch.get_rng_state()
        result = move(velocity, sample)
        if not torch.equal(drawn, torch.get_rng_state()):
            raise StatsError(
                f"{type(self.stage.pipe.scheduler).__name__} drew noise at step {step}, so no two "
                "runs can be compared: use a deterministic scheduler"
            )
        # Copies, since pipelines write into the tensors that they hand over.
        self._made = result.detach().to("cpu", copy=True)
        self._end_step(step, result, performer)
        return result

    def _check(self, step: int, velocity: Tensor, sample: Tensor) -> None:
        if not torch.isfinite(velocity).all():
            raise StatsError(
                f"the model's output at step {step} holds NaN or infinity: the run overflowed; "
                "calibrate in float32 or bfloat16"
            )
        if len(velocity) != self.prompts:
            raise StatsError(
                f"the scheduler got {len(velocity)} images for {self.prompts} prompts: leave "
                "num_images_per_prompt at 1, and give prompts one by one, not as lists"
            )
        if velocity.shape != sample.shape:
            raise StatsError(
                f"the scheduler got a velocity of shape {tuple(velocity.shape)} for latents of "
                f"shape {tuple(sample.shape)}: this pipeline's model predicts more than a velocity"
            )

    def _compare(self, sample: Tensor) -> None:
        """Count the steps after which an element was left as the scheduler made it.

        Rounding to the model's precision, which some loops do between steps, is no change. Add up
        how far short the scheduler fell of a tenth of what the velocity says.
        """
        run = self.run
        if not run.latents:
            run.left = torch.zeros(sample.shape, dtype=torch.int32)
            run.missing = torch.zeros(sample.shape)
            return
        assert run.left is not None and run.missing is not None and self._made is not None
        step = len(run.latents) - 1
        given = (sample.detach().cpu(), self._made, run.latents[step], run.velocities[step])
        after, made, before, velocity = (tensor.float() for tensor in given)
        rounding = 2 * self._epsilon * (made.abs() + made.square().mean().sqrt())
        run.left += (after - made).abs() <= rounding
        due = (run.sigmas[step + 1] - run.sigmas[step]) * velocity
        run.missing += due.abs() - 10 * (made - before).abs() - rounding

    def _end_step(self, step: int, result: Tensor, performer: ReplayableTransformer | None) -> None:
        run, scheduler = self.run, self.stage.pipe.scheduler
        if step == 0 and running_index(scheduler) is not None:
            # Some image-to-image loops leave it to the scheduler to find where it starts.
            run.sigmas = listed_sigmas(scheduler)[step_index(scheduler) - 1 :]
        last = len(run.sigmas) - 2
        if step == last:
            run.latents.append(result.detach().to("cpu", copy=True))
        if performer is not None:
            groups = range(len(performer.groups))
            sizes = tuple(performer.residual_bytes(step, group) for group in groups)
            run.calls[-1].group_bytes = sizes
            self.on_step(step)
            performer.times.end_step()
            self._returned = performer.times.clock.mark()
        else:
            self.on_step(step)
            self._returned = None
        if step == last:
            for each in self.performers.values():
                each.clear()  # decoding needs the memory
