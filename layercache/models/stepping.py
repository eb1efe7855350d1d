"""Where a pipeline hands the guided model output to its scheduler, observed or replaced.

`scheduler.step` is the one place that every flow-matching pipeline of diffusers passes once a step,
after guidance of whatever kind. Only the instance is patched, and the patch is undone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from layercache.models._foreign import first_index, running_index
from layercache.models.patching import wrap_method

StepFunction = Callable[[int, Tensor, Tensor], Tensor | None]
"""(step index, guided model output, sample before the step) to the output that is to be used.

`None` means that no step is taken: the pipeline gets its sample back as it was.
"""


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
    return first_index(scheduler) if index is None else index


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


def tap_step(scheduler: Any, function: StepFunction) -> Callable[[], None]:
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
        if output is None:
            return _Unmoved((sample,))
        return inner(output, timestep, sample, *args, **kwargs)

    return wrap_method(scheduler, "step", step)
