"""Where a pipeline hands the guided model output to its scheduler, observed or replaced.

`scheduler.step` is the one place that every flow-matching pipeline of diffusers passes once a step,
after guidance of whatever kind. Only the instance is patched, and the patch is undone.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from layercache.models._foreign import first_index, running_index, start_over
from layercache.models.patching import wrap_method

_EULER = 1e-4
# The first step of every solver is Euler's; those that lean on steps before do so from the second.
_TRIED = 4

StepFunction = Callable[[int, Tensor, Tensor], Tensor]
"""(step index, guided model output, sample before the step) to the output that is to be used."""


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


def step_index(scheduler: Any) -> int:
    """Index into `scheduler.sigmas` of the call under way or, between calls, of the next one.

    diffusers leaves the index unset until the first `step` of a run; until then the run starts
    at `begin_index` (set by image-to-image pipelines) or at 0.
    """
    index = running_index(scheduler)
    return first_index(scheduler) if index is None else index


def listed_sigmas(scheduler: Any) -> tuple[float, ...]:
    """The noise levels of the schedule that is set, one a call and the last, as Python floats.

    A schedule that rises (Mochi's) counts how much of the image there is: its complement is noise.
    Heun's method calls the model twice a step and lists the level of the second call twice.
    """
    sigmas = [float(sigma) for sigma in scheduler.sigmas.tolist()]
    if len(sigmas) > 1 and sigmas[0] < sigmas[-1]:
        return tuple(1.0 - sigma for sigma in sigmas)
    return tuple(sigmas)


def first_calls(sigmas: Sequence[float]) -> list[int]:
    """Which of a scheduler's calls begin a step, by its listed levels.

    A call leads to the level that is listed after its own. The second call of a step is made at the
    level that the step leads to, and so leads to no other.

    Example:
        >>> first_calls([1.0, 0.6, 0.6, 0.2, 0.2, 0.0])
        [0, 2, 4]
    """
    return [index for index, (a, b) in enumerate(itertools.pairwise(sigmas)) if a != b]


def calls_twice(scheduler: Any) -> bool:
    """Whether a scheduler calls the model twice a step, as it says itself."""
    return int(getattr(scheduler, "order", 1)) > 1


def levels(sigmas: Sequence[float]) -> tuple[float, ...]:
    """The T+1 levels of T steps, each once.

    Example:
        >>> levels([1.0, 0.6, 0.6, 0.2, 0.2, 0.0])
        (1.0, 0.6, 0.2, 0.0)
    """
    return (*(sigmas[index] for index in first_calls(sigmas)), *sigmas[-1:])


def sigmas_of(scheduler: Any) -> tuple[float, ...]:
    """The T+1 noise levels of the steps of the schedule that is set, falling."""
    return levels(listed_sigmas(scheduler))


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
def tapped_step(
    scheduler: Any, function: StepFunction, move: MoveFunction | None = None
) -> Iterator[None]:
    """Pass every guided output through `function` on its way into `scheduler.step`.

    `move` may put another sample in the place of what the scheduler made.
    """
    restore = tap_step(scheduler, function, move)
    try:
        yield
    finally:
        restore()


def tap_step(
    scheduler: Any, function: StepFunction, move: MoveFunction | None = None
) -> Callable[[], None]:
    """As `tapped_step`, but returns the function that removes the tap."""

    def step(
        inner: Callable[..., Any],
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        output = function(step_index(scheduler), model_output, sample)
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


def walk(
    scheduler: Any, velocities: Sequence[Tensor], sample: Tensor
) -> tuple[list[Tensor], bool] | None:
    """Let a copy of a scheduler take the first steps of the schedule that is set.

    Args:
        scheduler: With timesteps set; it is not changed, nor is any random state.
        velocities: The model outputs, one a step.
        sample: Where to start, on the CPU.

    Returns:
        The sample after each step, and whether random numbers were drawn; None for a scheduler that
        wants more than every pipeline gives it.
    """
    trial = copy.deepcopy(scheduler)
    samples = []
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        try:
            for name in ("sigmas", "timesteps"):
                setattr(trial, name, getattr(trial, name).cpu())
            start_over(trial)
            for velocity, timestep in zip(velocities, trial.timesteps, strict=False):
                # Of the class, since what was put on an instance may act on another one.
                sample = moved_sample(type(trial).step(trial, velocity, timestep, sample))
                samples.append(sample)
        except (TypeError, ValueError, IndexError, RuntimeError, AttributeError):
            return None
        return samples, not torch.equal(before, torch.get_rng_state())


def solver_of(scheduler: Any) -> str:
    """How a scheduler moves the latent: `"euler"`, `"noisy"` or `"other"`.

    Found out on a few steps with a handful of numbers: `"euler"` moves by (sigma_{t+1} - sigma_t)
    v_t, `"noisy"` draws random numbers. One that cannot be tried out like that counts as Euler's,
    which is left to itself.
    """
    generator = torch.Generator().manual_seed(0)
    sample, *velocities = torch.randn(1 + _TRIED, 1, 4, 2, 2, generator=generator)
    walked = walk(scheduler, velocities, sample)
    if walked is None:
        return "euler"
    samples, drawn = walked
    if drawn:
        return "noisy"
    sigmas = scheduler.sigmas.tolist()
    for index, reached in enumerate(samples):
        expected = sample + (sigmas[index + 1] - sigmas[index]) * velocities[index]
        if not torch.allclose(reached, expected, atol=_EULER):
            return "other"
        sample = reached
    return "euler"
