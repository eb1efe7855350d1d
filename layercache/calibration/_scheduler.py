"""Which schedulers can be calibrated: found out on a copy, before the model runs.

A copy of the scheduler steps through its whole schedule on a handful of numbers. That shows whether
it draws noise, and whether its model output is a velocity: with one constant velocity v every
solver of dz/dsigma = v, of whatever order, must arrive at z + (sigma_T - sigma_0) v.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from layercache.errors import StatsError
from layercache.models.stepping import first_calls, levels, listed_sigmas, step_index, walk

_TOLERANCE = 1e-3
_VELOCITY = "flow_prediction"
"""What diffusers' schedulers call it; those for flow matching alone have no `prediction_type`."""
_ADVICE = "use a deterministic flow-matching scheduler, such as FlowMatchEulerDiscreteScheduler"


def run_sigmas(scheduler: Any) -> tuple[float, ...]:
    """The listed noise levels from the call that the scheduler is at to the end."""
    return listed_sigmas(scheduler)[step_index(scheduler) :]


def check_prediction(scheduler: Any) -> None:
    """Refuse a scheduler whose configuration says that the model predicts no velocity.

    Raises:
        StatsError: It does; the message names what is predicted.
    """
    found = getattr(scheduler, "config", {}).get("prediction_type", _VELOCITY)
    if found != _VELOCITY:
        raise StatsError(
            f"by the prediction_type of {type(scheduler).__name__} the model predicts {found!r}, "
            "and plans extrapolate velocities, dz/dsigma with z = (1 - sigma) image + sigma noise: "
            f"{_ADVICE}, if the model was trained for it; a plan for this model cannot be made"
        )


def check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler whose runs cannot be compared with one another, or with a plan.

    Args:
        scheduler: With the timesteps of a run set.

    Raises:
        StatsError: It draws noise, calls the model more than twice a step, or its model's output is
            no velocity; the message names it.
    """
    name = type(scheduler).__name__
    if not isinstance(getattr(scheduler, "sigmas", None), Tensor):
        raise StatsError(f"{name} has no noise levels (`sigmas`): {_ADVICE}")
    listed = listed_sigmas(scheduler)
    sigmas, first = levels(listed), first_calls(listed)
    once = first == list(range(len(listed) - 1))
    twice = first == list(range(0, len(listed) - 1, 2)) and len(listed) % 2 == 0
    if len(scheduler.timesteps) > len(listed) - 1 or not (once or twice):
        raise StatsError(
            f"{name} lists {len(scheduler.timesteps)} calls for {len(sigmas) - 1} levels; one "
            f"call a step can be calibrated, or two at all steps but the last: {_ADVICE}"
        )
    if any(a <= b for a, b in itertools.pairwise(sigmas)) or abs(sigmas[-1]) > 1e-6:
        raise StatsError(
            f"the noise levels of {name} run {sigmas[0]:.4g}, {sigmas[1]:.4g}, ..., "
            f"{sigmas[-1]:.4g}; they must fall strictly and end at 0: {_ADVICE}"
        )
    if abs(sigmas[0]) > 1.5:
        raise StatsError(
            f"{name} starts at a noise level of {sigmas[0]:.4g}, so its model is no flow-matching "
            f"model, whose levels lie between 0 and 1: {_ADVICE}"
        )
    _try_out(scheduler, name)


def _try_out(scheduler: Any, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    velocity, start = torch.randn(2, 1, 4, 2, 2, generator=generator)
    sigmas = scheduler.sigmas.tolist()
    walked = walk(scheduler, [velocity] * (len(sigmas) - 1), start)
    if walked is None:
        return  # the recorded run shows what it does
    samples, drawn = walked
    if drawn:
        raise StatsError(
            f"{name} draws noise at every step, so no two runs can be compared: {_ADVICE}"
            f"{_setting(scheduler)}"
        )
    expected = start + (sigmas[-1] - sigmas[0]) * velocity
    if (samples[-1] - expected).abs().max() > _TOLERANCE:
        raise StatsError(
            f"{name} takes the model's output for something other than a velocity "
            f"(prediction_type is {scheduler.config.get('prediction_type', 'unknown')!r}), so "
            f"skipped steps cannot be predicted: {_ADVICE}"
        )


def _setting(scheduler: Any) -> str:
    stochastic = getattr(scheduler, "config", {}).get("stochastic_sampling")
    return " with stochastic_sampling=False" if stochastic else ""
