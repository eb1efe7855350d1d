"""`check_run`: what a run under a plan would be refused for, without computing it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from layercache.models.pipelines import free_models, run_pipeline
from layercache.plan import Plan
from layercache.runtime._apply import apply_plan


class _Begun(Exception):
    """The first computed call of the transformer: all that is checked was."""


def check_run(pipe: Any, plan: Plan, arguments: Mapping[str, Any]) -> list[str]:
    """Begin a run under a plan and stop it at the first call that would compute.

    The pipeline encodes the prompt and sets its noise levels as in a real run, so that the same
    checks are made. Of a pipeline with two transformers, the steps before this one's are computed.

    Args:
        pipe: The pipeline.
        plan: The plan.
        arguments: Of the pipeline's call, the prompt among them.

    Returns:
        What the run would warn of.

    Raises:
        ModelMismatchError: The run would be refused: another model or other noise levels.
        UnsupportedModelError: As `apply_plan`.
        LayerCacheError: As `apply_plan`.

    Example:
        >>> check_run(pipe, plan, {"prompt": "", "num_inference_steps": 50})  # doctest: +SKIP
        []
    """

    def stop(module: Any, args: Any, kwargs: Any) -> None:
        raise _Begun

    with warnings.catch_warnings():
        # What is warned of while the plan is put on stands in the report too.
        warnings.simplefilter("ignore")
        with apply_plan(pipe, plan) as run:
            hook = getattr(pipe, plan.component).register_forward_pre_hook(stop, with_kwargs=True)
            try:
                with torch.no_grad():
                    run_pipeline(pipe, arguments)
            except _Begun:
                free_models(pipe)
            finally:
                hook.remove()
            return [*run.report().problems, *_other_size(plan.setting, arguments)]


def _other_size(planned: Mapping[str, Any], arguments: Mapping[str, Any]) -> list[str]:
    """Sizes that are asked for and are not the plan's; latents, which would tell, are not made."""
    pixels = planned.get("pixels")
    rounded = pixels if isinstance(pixels, list) and len(pixels) == 2 else [None, None]
    found = []
    for name, made in (("width", rounded[0]), ("height", rounded[1]), ("num_frames", None)):
        known = [value for value in (planned.get(name), made) if value is not None]
        if known and arguments.get(name) is not None and arguments[name] not in known:
            found.append(f"{name} is {known[0]!r} in the plan and {arguments[name]!r} here")
    return found
