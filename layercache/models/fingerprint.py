"""What identifies a model for a plan, and the setting a plan was made in."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from layercache.models._foreign import has_adapters, origin_of
from layercache.models.adapters import adapter_for, blocks_of, unwrap
from layercache.models.calling import CALL_KEYS

_CALL_KEYS = (*CALL_KEYS, "num_inference_steps")
# What the noise levels of another step count or size follow from (`layercache.retarget`).
_SCHEDULER_KEYS = (
    "shift",
    "flow_shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "shift_terminal",
    "time_shift_type",
)
# Where the Hub's cache puts a repository's files, and what names a repository.
_CACHED = re.compile(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def model_fingerprint(transformer: nn.Module) -> dict[str, Any]:
    """What must match exactly between a plan and a model.

    Weights, paths, library versions and quantisation are left out on purpose, so that a plan also
    serves finetunes, LoRA and quantised copies of the model that it was made for.

    Returns:
        `class_name`; `block_lists`, the number of blocks by list, none where no adapter knows the
        model; and `architecture`, the SHA-256 of the model's configuration as canonical JSON.
    """
    adapter = adapter_for(transformer, required=False)
    config = _plain(_without_defaults(unwrap(transformer)))
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return {
        "class_name": adapter.class_name,
        "block_lists": {b.name: len(blocks_of(transformer, b)) for b in adapter.block_lists},
        "architecture": hashlib.sha256(text.encode()).hexdigest(),
    }


def setting_of(
    pipe: Any, call_kwargs: Mapping[str, Any] | None = None, *, component: str = "transformer"
) -> dict[str, Any]:
    """How a pipeline is being used: differences from a plan's setting deserve a warning.

    Args:
        pipe: A diffusers pipeline.
        call_kwargs: Keyword arguments of its call, if they are known.
        component: Which attribute of the pipeline is the transformer.

    Returns:
        JSON values: the classes of pipeline and scheduler, the scheduler's shift, the model's
        repository and commit, dtype, quantisation and active LoRA adapters, a modular pipeline's
        guider, and the call's step count, size and guidance scales, with the pipeline's own
        defaults where the call is silent. What is not known is left out. `call` holds the arguments
        that JSON can, so that a plan can be tried as it was calibrated.
    """
    scheduler = pipe.scheduler
    transformer = unwrap(getattr(pipe, component))
    found: dict[str, Any] = {
        "pipeline": type(pipe).__name__,
        "scheduler": type(scheduler).__name__,
        "dtype": str(getattr(transformer, "dtype", "")).removeprefix("torch."),
        "lora": _active_adapters(transformer),
    }
    config = getattr(transformer, "config", {})
    quantisation = config.get("quantization_config")
    if quantisation is not None:
        found["quantisation"] = str(
            getattr(quantisation, "quant_method", None) or type(quantisation).__name__
        )
    for key in _SCHEDULER_KEYS:
        if key in getattr(scheduler, "config", {}):
            found[f"scheduler_{key}"] = scheduler.config[key]
    found |= _checkpoint(pipe, transformer)
    guider = getattr(pipe, "guider", None)
    if guider is not None:
        # A modular pipeline's guidance is a component of it.
        found["guider"] = type(guider).__name__
        found["guider_scale"] = getattr(guider, "guidance_scale", None)
    if call_kwargs is not None:
        defaults = _call_defaults(pipe)
        for key in _CALL_KEYS:
            value = call_kwargs.get(key, defaults.get(key))
            if value is not None:
                found[key] = value
        found["call"] = {k: v for k, v in call_kwargs.items() if _kept(k, v)}
    result: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return result


def _kept(name: str, value: Any) -> bool:
    """Whether an argument of a call goes into a plan: plain, short and not decided elsewhere."""
    if name in ("prompt", "generator", "num_inference_steps", "output_type", "return_dict"):
        return False
    if isinstance(value, list | tuple):
        return len(value) <= 64 and all(_kept(name, item) for item in value)
    return isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 1000)


def _checkpoint(pipe: Any, transformer: nn.Module) -> dict[str, str]:
    """Repository and commit that the weights came from, where they came from the Hub."""
    names = [origin_of(owner) for owner in (transformer, pipe)]
    for name in names:
        cached = _CACHED.search(name)
        if cached is not None:
            return {"checkpoint": f"{cached[1]}/{cached[2]}", "checkpoint_commit": cached[3]}
    # A relative folder may look like a repository; a plan must not carry paths.
    for name in names:
        if _REPOSITORY.fullmatch(name) and not Path(name).exists():
            return {"checkpoint": name}
    return {}


def _call_defaults(pipe: Any) -> dict[str, Any]:
    parameters = inspect.signature(type(pipe).__call__).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, bool | int | float)}


def _without_defaults(module: nn.Module) -> dict[str, Any]:
    # A later diffusers may add an option; with its default it leaves the architecture as it was.
    parameters = inspect.signature(type(module).__init__).parameters
    defaults = {name: _plain(parameter.default) for name, parameter in parameters.items()}
    config = dict(getattr(module, "config", {}))
    return {k: v for k, v in config.items() if k not in defaults or _plain(v) != defaults[k]}


def _plain(value: Any) -> Any:
    """JSON values, without private keys, paths and quantisation."""
    if isinstance(value, Mapping):
        return {
            str(key): _plain(item)
            for key, item in value.items()
            if not str(key).startswith("_")
            and not str(key).endswith("_path")
            and key != "quantization_config"
        }
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _active_adapters(transformer: nn.Module) -> list[str]:
    # `active_adapters` raises without peft and before any adapter is loaded.
    if not has_adapters(transformer):
        return []
    model: Any = transformer
    names = model.active_adapters()
    return sorted(str(name) for name in names)
