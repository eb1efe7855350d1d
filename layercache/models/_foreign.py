"""Every private name of torch, diffusers and accelerate that LayerCache uses, here alone.

Their makers may rename these in any release. `tests/models/test_foreign.py` tries each of them on
what is installed, and names the one that is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves

NAMES = {
    "_begin_index": "diffusers' schedulers: the step at which a run starts",
    "_blocks": "diffusers' modular pipelines: their blocks themselves, of which `blocks` is a copy",
    "_call_impl": "torch.nn.Module: its call, with hooks, as it was before anything was compiled",
    "_cdata": "torch storages: what is equal for two views of one memory",
    "_compiled_call_impl": "torch.nn.Module: the call that is made instead, where it is set",
    "_diffusers_hook": "diffusers' models: the registry of their hooks",
    "_fn_refs": "diffusers' hook registry: what holds the functions that hooks call",
    "_hf_hook": "accelerate: the hook that keeps the weights of an offloaded model elsewhere",
    "_hf_peft_config_loaded": "diffusers' models: whether a LoRA was ever loaded",
    "_name_or_path": "diffusers' configurations: where the weights came from",
    "_orig_mod": "torch.compile: the module that was compiled",
    "_progress_bar_config": "diffusers' pipelines: the options of their progress bar",
    "_python_dispatch": "torch.utils: TorchDispatchMode",
    "_pytree": "torch.utils: tree_leaves",
    "_step_index": "diffusers' schedulers: the step under way, None before the first",
    "_version": "torch.Tensor: how often it was changed in place",
}
"""What each of the names is."""

CALL_SLOT = "_compiled_call_impl"


def plain_call(module: nn.Module) -> Callable[..., Any]:
    """The module's own call, whatever stands in `CALL_SLOT`."""
    call: Callable[..., Any] = module._call_impl
    return call


def compiled_from(module: nn.Module) -> nn.Module | None:
    """The module that `torch.compile` wrapped in this one."""
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None


def changes_of(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place; None if that is not counted (inference mode)."""
    return None if tensor.is_inference() else tensor._version


def storage_key(storage: Any) -> int:
    """Equal for tensors that share their memory."""
    return int(storage._cdata)


def hook_registry(module: nn.Module) -> Any:
    """The registry of diffusers' hooks on a module, or None."""
    return getattr(module, "_diffusers_hook", None)


def hook_references(registry: Any) -> Iterator[Any]:
    """What holds the functions that the hooks of a registry call."""
    yield from getattr(registry, "_fn_refs", ())


def execution_device(module: nn.Module) -> Any:
    """Where accelerate's hook lets a module compute, or None."""
    return getattr(getattr(module, "_hf_hook", None), "execution_device", None)


def has_adapters(module: nn.Module) -> bool:
    """Whether a LoRA was ever loaded into a model."""
    return bool(getattr(module, "_hf_peft_config_loaded", False))


def origin_of(owner: Any) -> str:
    """Repository or folder that a pipeline or model was loaded from; empty if it was not."""
    return str(getattr(owner, "config", {}).get("_name_or_path") or "")


def modular_blocks(pipe: Any) -> Any:
    """The blocks of a modular pipeline, or None."""
    return getattr(pipe, "_blocks", None)


@contextmanager
def without_bar(owner: Any) -> Iterator[None]:
    """Let the progress bar of a pipeline, or of its loop, keep quiet, and then be as it was."""
    held = vars(owner)
    before = held.get("_progress_bar_config")
    owner._progress_bar_config = {**(before or {}), "disable": True}
    try:
        yield
    finally:
        if before is None:
            held.pop("_progress_bar_config", None)
        else:
            owner._progress_bar_config = before


def counts_steps(scheduler: Any) -> bool:
    """Whether a scheduler keeps the index of its step."""
    return hasattr(scheduler, "_step_index")


def running_index(scheduler: Any) -> int | None:
    """The index of a scheduler's step under way, None before the first of a run."""
    index = getattr(scheduler, "_step_index", None)
    return None if index is None else int(index)


def first_index(scheduler: Any) -> int:
    """The index at which a scheduler's run starts."""
    return int(getattr(scheduler, "_begin_index", None) or 0)


def starts_anywhere(scheduler: Any) -> bool:
    """Whether a scheduler has not been told where its run starts: its first `step` finds out."""
    known = [getattr(scheduler, name, None) for name in ("_step_index", "_begin_index")]
    return hasattr(scheduler, "_step_index") and known == [None, None]


def start_over(scheduler: Any) -> None:
    """Put a scheduler at the first step of its schedule, also where a run is to begin late."""
    for name, value in (("_step_index", None), ("_begin_index", 0)):
        if hasattr(scheduler, name):
            setattr(scheduler, name, value)
