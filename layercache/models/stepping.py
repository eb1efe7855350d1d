"""Where a pipeline hands the guided model output to its scheduler, observed or replaced.

`scheduler.step` is the one place that every flow-matching pipeline of diffusers passes once a step,
after guidance of whatever kind. Only the instance is patched, and the patch is undone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from layercache.models._foreign import begin_index, counts_steps, rewind, running_index
from layercache.models.patching import wrap_method

_EULER = 1e-4
# The first step of every solver is Euler's; those that lean on steps before do so from the second.
_TRIED = 4

StepFunction = Callable[[int, Tensor, Tensor], Tensor | None]
"""(step index, guided model output, sample before the step) to the output that is to be used.

`None` means that no step is taken: the pipeline gets its sample back as it was.
"""


MoveFunction = Callable[[Tensor, Tensor, Any], Tensor | None]
"""(output that was used, sample before, what `step` returned) to the sample to return instead.

`None` leaves what was returned as it is.
"""


class Stepped(tuple[Tensor, ...]):
    """What a scheduler returns, in either of diffusers' forms, around another sample than its own.

    Attributes:
        used: The model output that the scheduler received.
    """

    used: Tensor

    @property
    def prev_sample(self) -> Tensor:
        return self[0]


class _Unmoved(tuple[Tensor]):
    """What a scheduler returns, in either of diffusers' forms, around an unchanged sample."""

    @property
    def prev_sample(self) -> Tensor:
        return self[0]


def step_index(scheduler: Any) -> int:
    """Index into `scheduler.sigmas` of the step under way or, between steps, of the next one.

    diffusers leaves the index unset until the first `step` of a run; until then the run starts
    at `begin_index` (set by image-to-image pipelines) or at 0.
    """
    index = running_index(scheduler)
    return (begin_index(scheduler) or 0) if index is None else index


def starts_anywhere(scheduler: Any) -> bool:
    """Whether the scheduler has not been told where its run starts: its first `step` finds out."""
    told = begin_index(scheduler) is not None or running_index(scheduler) is not None
    return counts_steps(scheduler) and not told


def sigmas_of(scheduler: Any) -> tuple[float, ...]:
    """The T+1 noise levels of the schedule that is set, falling, as Python floats.

    A schedule that rises (Mochi's) counts how much of the image there is: its complement is noise.
    """
    sigmas = [float(sigma) for sigma in scheduler.sigmas.tolist()]
    if len(sigmas) > 1 and sigmas[0] < sigmas[-1]:
        return tuple(1.0 - sigma for sigma in sigmas)
    return tuple(sigmas)


def moved_sample(result: Any) -> Tensor:
    """The sample in what a scheduler's `step` returned, in either of diffusers' forms."""
    found: Tensor = result[0] if isinstance(result, tuple) else result.prev_sample
    return found


def with_sample(result: Any, sample: Tensor) -> Any:
    """What a scheduler's `step` returned, with another sample in it."""
    if isinstance(result, tuple):
        return (sample, *result[1:])
    if isinstance(result, dict):  # diffusers' outputs
        return type(result)(**{**result, "prev_sample": sample})
    changed = copy.copy(result)
    changed.prev_sample = sample
    return changed


@contextmanager
def tapped_step(scheduler: Any, function: StepFunction) -> Iterator[None]:
    """Pass every guided output through `function` on its way into `scheduler.step`."""
    restore = tap_step(scheduler, function)
    try:
        yield
    finally:
        restore()


def tap_step(
    scheduler: Any, function: StepFunction, move: MoveFunction | None = None
) -> Callable[[], None]:
    """As `tapped_step`, but returns the function that removes the tap.

    `move` may put another sample in the place of what the scheduler made.
    """

    def step(
        inner: Callable[..., Any],
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        output = function(step_index(scheduler), model_output, sample)
        if output is None:
            return _Unmoved((sample,))
        result = inner(output, timestep, sample, *args, **kwargs)
        if move is None:
            return result
        used = result.used if isinstance(result, Stepped) else output
        moved = move(used, sample, result)
        if moved is None:
            return result
        stepped = Stepped((moved,))
        stepped.used = used
        return stepped

    return wrap_method(scheduler, "step", step)


def solver_of(scheduler: Any) -> str:
    """How a scheduler moves the latent: `"euler"`, `"noisy"` or `"other"`.

    Found out on a copy, which takes the first steps of the schedule on a handful of numbers:
    `"euler"` moves by (sigma_{t+1} - sigma_t) v_t, `"noisy"` draws random numbers. One that cannot
    be tried out like that counts as Euler's, which is left to itself.
    """
    trial = copy.deepcopy(scheduler)
    generator = torch.Generator().manual_seed(0)
    solver = "euler"
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        try:
            for name in ("sigmas", "timesteps"):
                setattr(trial, name, getattr(trial, name).cpu())
            # From the start, also where the run is to begin late.
            rewind(trial)
            sigmas = trial.sigmas.tolist()
            sample = torch.randn(1, 4, 2, 2, generator=generator)
            for index, timestep in enumerate(trial.timesteps[:_TRIED]):
                velocity = torch.randn(sample.shape, generator=generator)
                expected = sample + (sigmas[index + 1] - sigmas[index]) * velocity
                # Of the class, since what was put on an instance may act on another one.
                sample = moved_sample(type(trial).step(trial, velocity, timestep, sample))
                if not torch.allclose(sample, expected, atol=_EULER):
                    solver = "other"
        except (TypeError, ValueError, IndexError, RuntimeError, AttributeError):
            return "euler"
        return solver if torch.equal(before, torch.get_rng_state()) else "noisy"
