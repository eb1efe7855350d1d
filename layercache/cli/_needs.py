"""What each command imports besides the base install, asked for before anything is spent."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any

from layercache.errors import LayerCacheError

EXTRAS = {
    "torch": "diffusers",
    "diffusers": "diffusers",
    "transformers": "diffusers",
    "safetensors": "diffusers",
    "accelerate": "diffusers",
    "matplotlib": "plot",
    "PIL": "plot",
    "torchmetrics": "eval",
    "huggingface_hub": "hub",
}
"""The extra of `layercache-flow` that installs a module."""
_MODEL = ("torch", "diffusers", "transformers")
_PICTURES = ("matplotlib", "PIL")
COMMANDS: dict[str, tuple[str, ...]] = {
    "calibrate": _MODEL,
    "check": _MODEL,
    "refine": _MODEL,
    "eval": (*_MODEL, "torchmetrics"),
    "trial": (*_MODEL, "torchmetrics"),
    "demo": (*_MODEL, "torchmetrics", *_PICTURES),
    "push": ("huggingface_hub",),
}
"""What a command imports; those that are not named need nothing more than the base install."""
OPTIONS: dict[tuple[str, str], tuple[str, ...]] = {
    ("eval", "out"): _PICTURES,
    ("export", "scheduler"): ("torch", "diffusers"),
    ("*", "offload"): ("accelerate",),
    ("*", "lora"): ("peft",),
}
"""What an option of a command adds, where it is given."""
INSTEAD = {"check": ("stats_file", "--stats FILE checks against statistics and needs none of it")}
"""An option with which a command needs nothing, and what is said of it."""


def require(command: str, given: Mapping[str, Any]) -> None:
    """Refuse a command whose imports are not all installed.

    Args:
        command: Its name.
        given: Values of its options, by parameter name.

    Raises:
        LayerCacheError: Names what is missing, and the extras that hold it.
    """
    option, instead = INSTEAD.get(command, ("", ""))
    if given.get(option):
        return
    needed = list(COMMANDS.get(command, ()))
    for (name, key), modules in OPTIONS.items():
        if name in ("*", command) and given.get(key):
            needed += modules
    missing = [name for name in dict.fromkeys(needed) if not _installed(name)]
    if missing:
        text = f"{command} needs {_joined(missing)}, not installed here: {install(missing)}"
        raise LayerCacheError(f"{text}; {instead}" if instead else text)


def install(modules: Iterable[str]) -> str:
    """The command that installs some modules."""
    extras = sorted({EXTRAS[name] for name in modules if name in EXTRAS})
    others = [name for name in modules if name not in EXTRAS]
    ours = [f"'layercache-flow[{','.join(extras)}]'"] if extras else []
    return " ".join(["pip install", *ours, *others])


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # imported, and without a specification
        return True


def _joined(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
