"""`LayerCacheScheduler`: a plan of whole steps as nothing but a scheduler of its computed steps.

No hooks and no adapter: the pipeline makes N calls in place of T. Between two of them the latent
makes the plan's one move (`runtime.executor`). Before the first skipped step the scheduler that it
replaces makes its own steps, whatever solver that is; one that calls the model twice a step makes
none.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any, Self

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor

from layercache.errors import ModelMismatchError, PlanError, UnsupportedModelError
from layercache.models.stepping import (
    Stepped,
    first_calls,
    listed_sigmas,
    moved_sample,
    sigmas_of,
    solver_of,
)
from layercache.plan import Plan
from layercache.runtime._position import compare_sigmas
from layercache.runtime.arithmetic import affine
from layercache.runtime.executor import StepExecutor

_HOOKS = "run it with layercache.runtime.apply_plan"
_DEFAULT = "FlowMatchEulerDiscreteScheduler"


def _of_base(name: str) -> Any:
    """A number of the scheduler that this one stands for, which pipelines read and set."""
    return property(
        lambda self: float(getattr(self.base, name)),
        lambda self, value: setattr(self.base, name, value),
    )


class LayerCacheScheduler(SchedulerMixin, ConfigMixin):
    """Runs a plan of whole steps in the place of a pipeline's scheduler.

    Made by `from_plan`; `save_pretrained` and `from_pretrained` work as with any scheduler.

    Args:
        plan: The plan, as `Plan.to_dict` gives it.
        base: The scheduler that it stands for: its class under `class_name`, and its configuration.

    Example:
        >>> pipe.scheduler = LayerCacheScheduler.from_plan(plan, pipe.scheduler)  # doctest: +SKIP
        >>> image = pipe("a large red circle", num_inference_steps=50).images[0]  # doctest: +SKIP
    """

    order = 1
    sigma_min, sigma_max = _of_base("sigma_min"), _of_base("sigma_max")

    @register_to_config
    def __init__(
        self, plan: Mapping[str, Any] | None = None, base: Mapping[str, Any] | None = None
    ) -> None:
        if plan is None:
            raise PlanError(
                "a LayerCacheScheduler needs a plan: make one with LayerCacheScheduler.from_plan"
            )
        self.plan = Plan.from_dict(plan)
        self.executor: StepExecutor[Tensor] = StepExecutor.of(
            self.plan, affine, lambda tensor: tensor.detach().clone()
        )
        self.base = _made(base, self.plan)
        # Pipelines read the shift, the number of training steps and the like.
        self.register_to_config(**{**_config(self.base), "plan": plan, "base": base})
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.sigmas: Tensor = self.base.sigmas
        self.timesteps: Tensor = self.base.timesteps
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._solver, self._twice = "euler", False
        self._levels: list[float] = []

    @classmethod
    def from_plan(cls, plan: Plan, scheduler: Any = None) -> Self:
        """A scheduler for a plan.

        Args:
            plan: A plan whose groups are computed at every step that runs.
            scheduler: The scheduler that it replaces. With it, the noise levels that a pipeline
                asks for are compared with the plan's at every call. Without, their number is, and
                the scheduler is taken to be Euler's with the shift of the plan's setting.

        Raises:
            PlanError: The plan caches groups.
            UnsupportedModelError: The plan was made for a scheduler that is not Euler's, and none
                was given.
        """
        base = None
        if scheduler is not None:
            if isinstance(scheduler, cls):
                scheduler = scheduler.base
            base = {"class_name": type(scheduler).__name__, **_config(scheduler)}
        made: Self = cls(plan=plan.to_dict(), base=base)
        return made

    # -- what pipelines call -------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
        **kwargs: Any,
    ) -> None:
        """Set the plan's computed steps, where the pipeline asks for the plan's schedule.

        Raises:
            ModelMismatchError: It asks for other noise levels, or another number of them.
            UnsupportedModelError: The scheduler that this one stands for draws noise.
        """
        given = {"sigmas": sigmas, "mu": mu, "timesteps": timesteps, **kwargs}
        listed = next((v for v in (sigmas, timesteps) if v is not None), None)
        asked = num_inference_steps if listed is None else len(listed)
        if asked != self.plan.num_steps:
            raise ModelMismatchError(
                f"the pipeline asks for {asked} steps and the plan is for {self.plan.num_steps}: "
                f"pass num_inference_steps={self.plan.num_steps} (the plan computes "
                f"{len(self.executor.visited)} of them), or compile a plan for this schedule"
            )
        self._set_base(asked, device, given)
        visited = list(self.executor.visited)
        listed = torch.as_tensor(self.base.sigmas)
        first = first_calls(listed_sigmas(self.base))
        self._twice = len(first) < len(listed) - 1
        calls = [first[step] for step in visited]
        self.sigmas = listed[[*calls, -1]]
        self._levels = self.sigmas.tolist()
        self.timesteps = torch.as_tensor(self.base.timesteps)[calls].to(device)
        self.num_inference_steps = len(visited)
        self._step_index = self._begin_index = None
        self.executor.clear()

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *args: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Move the latent from a computed step to the next one.

        Returns:
            What diffusers' schedulers return, in both forms: a tuple whose only value is
            `prev_sample` too.
        """
        self._step_index = self._step_index or 0
        executor = self.executor
        start = executor.visited[self._step_index]
        stop = executor.after(start)
        mean = executor.compute(start, model_output)
        assert mean is not None
        if start < executor.first_pause and self._solver == "other" and not self._twice:
            moved = moved_sample(self.base.step(mean, timestep, sample, return_dict=False))
        else:
            length = self._levels[self._step_index + 1] - self._levels[self._step_index]
            moved = (sample.float() + length * mean.float()).to(model_output.dtype)
        executor.finish(stop - 1)
        self._step_index += 1
        return Stepped((moved,))

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Refuse to start anywhere but at the beginning.

        Raises:
            ModelMismatchError: The run starts late.
        """
        if begin_index:
            raise ModelMismatchError(
                f"the pipeline starts at step {begin_index} of the schedule, as image-to-image "
                f"does, and a plan's scheduler starts at the first: {_HOOKS}"
            )
        self._begin_index = begin_index

    def scale_model_input(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The sample as it is."""
        return sample

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        """Noise at the level of a timestep, as the scheduler that this one stands for mixes it."""
        mixed: Tensor = self.base.scale_noise(sample, timestep, noise)
        return mixed

    @property
    def step_index(self) -> int | None:
        """Which of the computed steps is next."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """As set."""
        return self._begin_index

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    # -- the scheduler that this one stands for ------------------------------------------------

    def _set_base(self, steps: int, device: Any, given: dict[str, Any]) -> None:
        known = inspect.signature(self.base.set_timesteps).parameters
        passed = {k: v for k, v in given.items() if v is not None and k in known}
        if "sigmas" not in passed and "timesteps" not in passed:
            passed["num_inference_steps"] = steps
        self.base.set_timesteps(device=device, **passed)
        if self.config.base is None:
            levels = torch.tensor(self.plan.sigmas, dtype=torch.float32)
            self.base.sigmas = levels
            self.base.timesteps = levels[:-1].to(device) * self.config.num_train_timesteps
            return
        offset, what = compare_sigmas(self.plan.sigmas, sigmas_of(self.base))
        if what is not None or offset:
            raise ModelMismatchError(
                f"this pipeline follows another noise schedule than the plan: {what}. Use the "
                "plan's step count, shift and resolution, or compile a plan for this schedule"
            )
        self._solver = solver_of(self.base)
        if self._solver == "noisy":
            raise UnsupportedModelError(
                f"{type(self.base).__name__} draws noise at every step, so a plan cannot leave out "
                "any: use a deterministic flow-matching scheduler"
            )


def _config(scheduler: Any) -> dict[str, Any]:
    return {k: v for k, v in dict(scheduler.config).items() if not k.startswith("_")}


def _made(base: Mapping[str, Any] | None, plan: Plan) -> Any:
    """The scheduler that the plan was made for, to ask for its noise levels and first steps."""
    setting = plan.setting
    if base is None:
        name = str(setting.get("scheduler", _DEFAULT))
        if name != _DEFAULT:
            raise UnsupportedModelError(
                f"the plan was made for a {name}, whose timesteps and steps are its own: pass it, "
                "LayerCacheScheduler.from_plan(plan, pipe.scheduler)"
            )
        shift = float(setting.get("scheduler_shift", 1.0))
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    config = copy.deepcopy(dict(base))
    name = config.pop("class_name")
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise UnsupportedModelError(
            f"diffusers has no scheduler {name!r}, which the plan's scheduler stands for: {_HOOKS}"
        )
    return kind.from_config(config)
