"""The pipeline run again on what was recorded: its calls are answered, its steps as they were.

No model is computed, while the loop, the guidance and the windows are the pipeline's own, so that
what it makes of other outputs is read where it always is. The scheduler is handed the recorded
velocities, which brings the recorded latents back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from layercache.calibration._jobs import Replay
from layercache.calibration._record import Run
from layercache.calibration._stage import At, Move, Others, Over, Stage
from layercache.calibration.prompts import Batch
from layercache.errors import StatsError
from layercache.models.gates import Call
from layercache.models.tensors import tensors_in

_TOLERANCE = 1e-2
"""Kernels may sum in another order from one call to the next."""
OnVelocity = Callable[[int, Tensor], None]


class Reenactment:
    """Directs a run that repeats a recorded one.

    Args:
        run: The record.
        on_velocity: Gets each step and the guided output that the pipeline made there.
        replay: Whose outputs answer the calls, where they were kept; None for the calls' own.
        stale: Steps whose calls are answered with what the step before gave.
        changed: What to change the latent by after some steps.
        known: How many steps are not computed; after them the model runs, and the latent moves as
            the record's did plus what the difference of the velocities adds (`_followed`).
        ends: Whether the run ends with its last step, before anything is decoded.
    """

    def __init__(
        self,
        run: Run,
        *,
        on_velocity: OnVelocity = lambda step, velocity: None,
        replay: Replay | None = None,
        stale: Collection[int] = (),
        changed: dict[int, Tensor] | None = None,
        known: int | None = None,
        ends: bool = True,
    ) -> None:
        self.run, self.on_velocity, self.replay, self.stale = run, on_velocity, replay, stale
        self.changed = changed or {}
        self.known = run.steps if known is None else known
        self.ends = ends
        self.final: Tensor | None = None

    def called(self, at: At, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a call of a known step."""
        primes = at.step == 0 and self.run.primed and self.known < self.run.steps
        # An error's own path does not ask for a step's second call (`_followed`).
        if (at.step >= self.known and at.step in self.run.first) or primes:
            return inner(*args, **kwargs)
        kept = self.run.kept
        key = (at.step, at.number, self.replay)
        if at.step in self.stale:
            key = (at.step - 1, at.number, None)
        if key not in kept:
            key = (at.step, at.number, None)
        if key not in kept:
            raise StatsError(
                f"run again, the pipeline called the transformer a {at.number + 1}th time at step "
                f"{at.step}, which it had not: its loop does not repeat itself, so it cannot be "
                "calibrated"
            )
        return kept.get(key, tensors_in([args, kwargs])[0].device)

    def stepped(self, step: int, velocity: Tensor, sample: Tensor, move: Move) -> Tensor:
        """Read the velocity; make the step of the record."""
        run = self.run
        self.on_velocity(step, velocity)
        then = run.latents[step].to(sample)
        result = move(run.velocities[step].to(velocity), then)
        if step >= self.known:
            result = self._followed(step, velocity, sample, then, result)
        if step in self.changed:
            result = result + self.changed[step].to(result)
        if step == run.steps - 1:
            self.final = result.detach().to("cpu", copy=True)
            if self.ends:
                raise Over
        return result

    def _followed(
        self, step: int, velocity: Tensor, sample: Tensor, then: Tensor, result: Tensor
    ) -> Tensor:
        """Z' + (z_next - z) + dsigma (v' - v): an error's own path, whatever the sampler.

        Under Euler's method this is its step. Others would mix in what they remember.
        """
        run = self.run
        sigmas = run.sigmas
        change = (velocity - run.velocities[step].to(velocity)).float() * run.sign
        if isinstance(run.mask, Tensor):
            change = change * run.mask.to(change)
        moved = (sigmas[step + 1] - sigmas[step]) * change
        return result + (sample - then).to(result) + moved.to(result)


def check_repeats(stage: Stage, batch: Batch, run: Run) -> Others:
    """Run the pipeline again on its own record, which must come out to the last bit.

    Returns:
        How the pipeline's other models may be treated in further runs: `"answer"` if they need not
        be computed again, else `"run"`.

    Raises:
        StatsError: The pipeline does not repeat itself.
    """
    ways: tuple[Others, ...] = ("answer", "run")
    wrong: str | None = None
    for others in ways:
        wrong = _first_difference(stage, batch, run, others)
        if wrong is None:
            return others
    raise StatsError(
        f"this pipeline does not repeat itself: run again with the same outputs of the model, "
        f"{wrong}. It draws noise besides the starting one, or keeps state between runs"
    )


def check_forgets(stage: Stage, batch: Batch, run: Run, others: Others) -> None:
    """Replace the outputs of every other step; the pipeline must make of the others what it did.

    Raises:
        StatsError: The guidance keeps state between steps, as momentum does.
    """
    for start in (1, 2):
        wrong = _first_difference(stage, batch, run, others, _alike(run, start))
        if wrong is not None:
            raise StatsError(
                "this pipeline's guidance keeps state between steps (momentum guidance does): "
                f"with other model outputs at the steps before, {wrong}. Single steps cannot be "
                "judged then: switch that guidance off for calibration"
            )


def check_stateless(stage: Stage, batch: Batch, run: Run, others: Others) -> bool:
    """Compute the second step again, after a first one that was only answered.

    Returns:
        Whether the first step has to be computed for that (`Run.primed`).

    Raises:
        StatsError: The model gives something else even then: it keeps state between its calls.
    """
    if len(run.first) < 2:
        return False
    second = run.first[1]
    reason: str | None = None
    for primed in (False, True):
        found: list[Tensor] = []
        run.primed = primed
        director = _Second(run, found)
        try:
            stage.play(batch, director, others)
        except (RuntimeError, ValueError, KeyError, AttributeError, AssertionError) as error:
            # Caches of other libraries say in their own ways that they are empty.
            reason = str(error).split("\n")[0]
            continue
        change = (found[0].cpu() - run.velocities[second]).float().norm()
        if change <= _TOLERANCE * run.velocities[second].float().norm():
            return primed
        reason = "its output was another"
    raise StatsError(
        "the model keeps state between its calls: computed again on its own, the second step of a "
        f"run failed ({reason}), so single steps cannot be judged"
    )


def _first_difference(
    stage: Stage, batch: Batch, run: Run, others: Others, stale: Collection[int] = ()
) -> str | None:
    """What first differs from the record at the steps whose outputs are their own."""
    found: list[str] = []

    def compare(step: int, velocity: Tensor) -> None:
        if step in stale or found:
            return
        if not _same(velocity, run.velocities[step]):
            found.append(f"it made another velocity at step {step}")

    stage.play(batch, _Checked(run, found, on_velocity=compare, stale=stale), others)
    return found[0] if found else None


class _Second(Reenactment):
    """Ends when the second step was computed."""

    def __init__(self, run: Run, found: list[Tensor]) -> None:
        super().__init__(run, known=run.first[1])
        self._found = found

    def stepped(self, step: int, velocity: Tensor, sample: Tensor, move: Move) -> Tensor:
        """As for every re-enactment, but for the end."""
        if step == self.known:
            self._found.append(velocity)
            raise Over
        return super().stepped(step, velocity, sample, move)


class _Checked(Reenactment):
    """Also compares what the scheduler receives besides the velocity."""

    def __init__(self, run: Run, found: list[str], **options: Any) -> None:
        super().__init__(run, **options)
        self._found = found

    def stepped(self, step: int, velocity: Tensor, sample: Tensor, move: Move) -> Tensor:
        """As for every re-enactment."""
        if not self._found and not _same(sample, self.run.latents[step]):
            self._found.append(f"the latents at step {step} were others")
        return super().stepped(step, velocity, sample, move)


def _alike(run: Run, start: int) -> list[int]:
    """Every other step from `start` on that is called as the step before it."""
    return [
        step
        for step in range(start, run.steps, 2)
        if run.calls[step].component == run.calls[step - 1].component
        and run.calls[step].outputs == run.calls[step - 1].outputs
    ]


def _same(found: Tensor, recorded: Tensor) -> bool:
    return found.shape == recorded.shape and torch.equal(found.cpu(), recorded)
