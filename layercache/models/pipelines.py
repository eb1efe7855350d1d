"""Calls of diffusers' pipelines, classic and modular, and what they return."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from layercache.models._foreign import modular_blocks, without_bar

_OUTPUTS = ("images", "videos", "frames", "latents")
"""Names under which a modular pipeline leaves what it made, the most finished first."""


def is_modular(pipe: Any) -> bool:
    """Whether a pipeline is made of diffusers' modular blocks."""
    return any(parent.__name__ == "ModularPipeline" for parent in type(pipe).__mro__)


def components_of(pipe: Any) -> dict[str, nn.Module]:
    """The models of a pipeline, by the name of its attribute.

    Example:
        >>> from layercache.reference import load_pipeline
        >>> sorted(components_of(load_pipeline()))
        ['text_encoder', 'transformer', 'vae']
    """
    try:
        found = getattr(pipe, "components", None)
    except ValueError:  # diffusers' way to say that a subclass takes other arguments than it keeps
        found = None
    named: dict[str, Any] = found if isinstance(found, dict) else vars(pipe)
    return {name: value for name, value in named.items() if isinstance(value, nn.Module)}


def decodes(pipe: Any) -> bool:
    """Whether the pipeline makes images or videos of its latents."""
    return getattr(pipe, "vae", None) is not None


def run_pipeline(pipe: Any, arguments: Mapping[str, Any], *, seed: int = 0) -> Tensor:
    """Call a pipeline from the start, whatever was drawn before, without its progress bar.

    Args:
        pipe: The pipeline.
        arguments: Arguments of its call. Generators are copied, since they are stateful.
        seed: Of torch's global generators during the call, which are left as they were.

    Returns:
        (B, C, H, W) images or (B, F, C, H, W) videos in [0, 1] on the CPU, or latents where nothing
        can decode them.
    """
    call = dict(arguments)
    generators = call.get("generator")
    if isinstance(generators, list):
        call["generator"] = [g.clone_state() for g in generators]
    elif isinstance(generators, torch.Generator):
        call["generator"] = generators.clone_state()
    call["output_type"] = "pt" if decodes(pipe) else "latent"
    with torch.random.fork_rng(_cuda_devices()), ExitStack() as quiet:
        for owner in loop_owners(pipe):
            quiet.enter_context(without_bar(owner))
        # Some pipelines draw from the global generator besides the one that they are given.
        torch.manual_seed(seed)
        modular = is_modular(pipe)
        output = _modular_output(pipe, call) if modular else pipe(**call, return_dict=False)[0]
    tensor = output if isinstance(output, Tensor) else torch.stack(list(output))
    if decodes(pipe) and tensor.ndim == 4 and _makes_videos(pipe):
        tensor = tensor[None]
    return tensor.detach().float().cpu()


def _makes_videos(pipe: Any) -> bool:
    """Whether frames are asked for; Cosmos3's pipeline returns those of its one video unbatched."""
    return "num_frames" in inspect.signature(type(pipe).__call__).parameters


def _modular_output(pipe: Any, call: dict[str, Any]) -> Any:
    asked = call.pop("output", None)
    # A modular pipeline warns of arguments that none of its blocks takes.
    if all(parameter.name != "output_type" for parameter in modular_blocks(pipe).inputs):
        del call["output_type"]
    state = pipe(**call)
    if asked is not None:
        return state.get(asked)
    for name in _OUTPUTS:
        found = state.get(name)
        if found is not None:
            return found
    raise ValueError(
        f"{type(pipe).__name__} returned none of {', '.join(_OUTPUTS)}: name what it makes with "
        "output="
    )


def loop_owners(pipe: Any) -> Iterator[Any]:
    """What has the progress bars of a pipeline: itself, or the loop blocks of a modular one."""
    # `pipe.blocks` of a modular pipeline is a copy.
    waiting = [pipe, modular_blocks(pipe)]
    while waiting:
        owner = waiting.pop()
        if hasattr(owner, "progress_bar"):
            yield owner
        inside = getattr(owner, "sub_blocks", None)
        if isinstance(inside, Mapping):
            waiting += inside.values()


def _cuda_devices() -> list[int]:
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


def free_models(pipe: Any) -> None:
    """What a pipeline does after its last model call, for a call that was ended before."""
    free = getattr(pipe, "maybe_free_model_hooks", None)
    if callable(free):
        free()
