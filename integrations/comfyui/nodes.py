"""The nodes: one samples by a plan of whole steps, the other measures what plans are made of.

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
from layercache.stats import CalibrationStats

Sampler = Callable[..., torch.Tensor]
"""A function as those of `comfy.k_diffusion.sampling`."""
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


class LayerCacheCalibrate:
    """A sampler that measures the model while it samples, and adds that to a statistics file.

    Every generation counts as one prompt; four to eight of different prompts and seeds are enough.
    """

    CATEGORY = LayerCachePlan.CATEGORY
    DESCRIPTION = "Euler, in full, and six times as slow: measures what LayerCache plans need."
    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The name of the file in `models/layercache`, without its ending."""
        return {"required": {"name": ("STRING", {"default": "stats"})}}

    def make(self, name: str) -> tuple[Any]:
        """The sampler.

        Raises:
            ValueError: The name is none of a file.
        """
        if not name or os.path.basename(name) != name or name.startswith("."):
            raise ValueError(f"name is {name!r}; it must be that of a file, without a folder")
        path = os.path.join(folder_paths.models_dir, FOLDER, f"{name}.npz")
        return (comfy.samplers.KSAMPLER(calibrating(path)),)


def sigmas_of(plan: Plan) -> torch.Tensor:
    """The levels of the computed steps, and 0.

    Raises:
        PlanError: The plan caches groups of blocks.
    """
    visited = StepExecutor.of(plan).visited
    return torch.tensor([*(plan.sigmas[step] for step in visited), plan.sigmas[-1]])


def sampler_of(plan: Plan) -> Sampler:
    """Samples at the computed steps of a plan."""
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
        _check_model(model)
        _check_size(plan, x)
        executor: StepExecutor[torch.Tensor] = StepExecutor.of(plan)
        bar, numbers = tqdm(total=len(executor.visited), disable=disable), itertools.count()

        def velocity(latent: torch.Tensor, sigma: float) -> torch.Tensor:
            bar.update()
            return _velocity(model, latent, sigma, extra_args, callback, next(numbers))

        with torch.no_grad(), bar:
            return executor.run(velocity, x)

    return sample


def calibrating(path: str) -> Sampler:
    """Euler's method in full, after adding what it measures to a statistics file."""

    def sample(
        model: Any,
        x: torch.Tensor,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        disable: bool | None = None,
    ) -> torch.Tensor:
        from layercache.calibration import calibrate_function

        _check_model(model)
        if len(x) != 1:
            raise ValueError(f"the batch has {len(x)} latents; calibrate with one at a time")
        levels = sigmas.tolist()
        stats = calibrate_function(
            lambda latent, sigma, _: _velocity(model, latent, sigma, extra_args),
            levels,
            [x],
            name=f"ComfyUI {type(model.inner_model.inner_model).__name__}",
        )
        if os.path.exists(path):
            kept = CalibrationStats.load(path)
            # The same seed and prompt again add nothing.
            stats = kept if set(stats.prompt_ids) <= set(kept.prompt_ids) else kept.merge(stats)
        stats.save(path)
        _log.info("%s has %d prompts", path, stats.num_prompts)
        with torch.no_grad():
            for number, (here, there) in enumerate(itertools.pairwise(levels)):
                made = _velocity(model, x, here, extra_args, callback, number)
                x = x + (there - here) * made
        return x

    return sample


def _velocity(
    model: Any,
    latent: torch.Tensor,
    sigma: float,
    extra_args: dict[str, Any] | None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    number: int = 0,
) -> torch.Tensor:
    """(x - denoised) / sigma; an observer is told what ComfyUI's own samplers tell."""
    level = latent.new_full((len(latent),), sigma)
    denoised = model(latent, level, **(extra_args or {}))
    if callback is not None:
        here = {"i": number, "sigma": level[0], "sigma_hat": level[0]}
        callback({**here, "x": latent, "denoised": denoised})
    result: torch.Tensor = (latent - denoised) / sigma
    return result


def _check(plan: Plan, levels: torch.Tensor, sigmas: torch.Tensor) -> None:
    given = sigmas.detach().cpu().float()
    if len(given) != len(levels) or (given - levels).abs().max() > _TOLERANCE:
        shown = ", ".join(f"{float(sigma):.4f}" for sigma in given[:3])
        raise ModelMismatchError(
            f"the sampler got {len(given)} noise levels ({shown}, ...), and the plan's computed "
            f"steps have {len(levels)}: connect the SIGMAS of the same LayerCache node. Starting "
            "late (denoise below 1, split sigmas) cannot be done with a plan"
        )


def _check_model(model: Any) -> None:
    sampling = model.inner_model.inner_model.model_sampling
    if not isinstance(sampling, comfy.model_sampling.CONST):
        raise UnsupportedModelError(
            f"this model is sampled by {type(sampling).__name__}, which is no flow matching; plans "
            "are for flow-matching models (Flux, SD3, Qwen-Image, Wan, ...)"
        )


def _check_size(plan: Plan, x: torch.Tensor) -> None:
    shape = plan.setting.get("latent_shape")
    wanted = torch.Size(shape).numel() if isinstance(shape, list) else None
    if wanted is not None and wanted != x[0].numel():
        _log.warning(
            "the plan was made for latents of %d values, and these have %d: another size or "
            "number of frames than it was calibrated for, so its prediction does not hold",
            wanted,
            x[0].numel(),
        )
