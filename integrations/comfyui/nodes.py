"""The node: reads a plan of whole steps and gives what SamplerCustom takes, SAMPLER and SIGMAS.

ComfyUI's samplers get a function of latent and noise level that returns the denoised latent,
guidance and all. For a flow-matching model the velocity is v = (x - denoised) / sigma; LayerCache's
executor says at which levels it is computed, and moves the latent.
"""

import hashlib
import itertools
import logging
import os
from collections.abc import Callable
from typing import Any

import comfy.model_sampling
import comfy.samplers
import folder_paths
import torch
from tqdm.auto import tqdm

from layercache.errors import ModelMismatchError, UnsupportedModelError
from layercache.plan import Plan
from layercache.runtime.executor import StepExecutor

FOLDER = "layercache"
"""Plans lie in `models/layercache`, or in folders of this name in `extra_model_paths.yaml`."""
_TOLERANCE = 1e-4
_log = logging.getLogger("layercache")

folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))


class LayerCachePlan:
    """Loads a plan; its outputs go into SamplerCustom or SamplerCustomAdvanced."""

    CATEGORY = "sampling/custom_sampling/samplers"
    DESCRIPTION = "Samples at the computed steps of a LayerCache plan alone."
    RETURN_TYPES = ("SAMPLER", "SIGMAS")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """A choice of the plans in the folder."""
        files = folder_paths.get_filename_list(FOLDER)
        return {"required": {"plan": ([file for file in files if file.endswith(".json")],)}}

    @classmethod
    def IS_CHANGED(cls, plan: str) -> str:
        """A digest, so that a file that was written anew is read anew."""
        with open(folder_paths.get_full_path_or_raise(FOLDER, plan), "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()

    def load(self, plan: str) -> tuple[Any, torch.Tensor]:
        """The sampler of a plan, and the noise levels of its computed steps.

        Raises:
            PlanError: The file is no plan, or the plan caches groups of blocks.
        """
        found = Plan.load(folder_paths.get_full_path_or_raise(FOLDER, plan))
        if "Euler" not in str(found.setting.get("scheduler", "Euler")):
            _log.warning(
                "%s was made for %s; here the steps before the first skipped one are Euler's, so "
                "what it foretells of quality does not hold",
                plan,
                found.setting["scheduler"],
            )
        return comfy.samplers.KSAMPLER(sampler_of(found)), sigmas_of(found)


def sigmas_of(plan: Plan) -> torch.Tensor:
    """The levels of the computed steps, and 0.

    Raises:
        PlanError: The plan caches groups of blocks.
    """
    visited = StepExecutor.of(plan).visited
    return torch.tensor([*(plan.sigmas[step] for step in visited), plan.sigmas[-1]])


def sampler_of(plan: Plan) -> Callable[..., torch.Tensor]:
    """A function as those of `comfy.k_diffusion.sampling`."""
    levels = sigmas_of(plan)

    def sample(
        model: Any,
        x: torch.Tensor,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        disable: bool | None = None,
    ) -> torch.Tensor:
        _check(plan, levels, sigmas)
        _check_model(model, plan, x)
        executor: StepExecutor[torch.Tensor] = StepExecutor.of(plan)
        bar, numbers = tqdm(total=len(executor.visited), disable=disable), itertools.count()

        def velocity(latent: torch.Tensor, sigma: float) -> torch.Tensor:
            level = latent.new_full((len(latent),), sigma)
            denoised = model(latent, level, **(extra_args or {}))
            if callback is not None:
                here = {"i": next(numbers), "sigma": level[0], "sigma_hat": level[0]}
                callback({**here, "x": latent, "denoised": denoised})
            bar.update()
            return (latent - denoised) / sigma

        with torch.no_grad(), bar:
            return executor.run(velocity, x)

    return sample


def _check(plan: Plan, levels: torch.Tensor, sigmas: torch.Tensor) -> None:
    given = sigmas.detach().cpu().float()
    if len(given) != len(levels) or (given - levels).abs().max() > _TOLERANCE:
        shown = ", ".join(f"{float(sigma):.4f}" for sigma in given[:3])
        raise ModelMismatchError(
            f"the sampler got {len(given)} noise levels ({shown}, ...), and the plan's computed "
            f"steps have {len(levels)}: connect the SIGMAS of the same LayerCache node. Starting "
            "late (denoise below 1, split sigmas) cannot be done with a plan"
        )


def _check_model(model: Any, plan: Plan, x: torch.Tensor) -> None:
    sampling = model.inner_model.inner_model.model_sampling
    if not isinstance(sampling, comfy.model_sampling.CONST):
        raise UnsupportedModelError(
            f"this model is sampled by {type(sampling).__name__}, which is no flow matching; plans "
            "are for flow-matching models (Flux, SD3, Qwen-Image, Wan, ...)"
        )
    shape = plan.setting.get("latent_shape")
    wanted = torch.Size(shape).numel() if isinstance(shape, list) else None
    if wanted is not None and wanted != x[0].numel():
        _log.warning(
            "the plan was made for latents of %d values, and these have %d: another size or "
            "number of frames than it was calibrated for, so its prediction does not hold",
            wanted,
            x[0].numel(),
        )
