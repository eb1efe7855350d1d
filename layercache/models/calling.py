"""Who calls a transformer, and with which arguments: read from the call stack.

A transformer may serve several pipelines, one inside the other (a preview from a callback), each
with a scheduler of its own, and nothing that it is given tells them apart. The stack does: a
pipeline calls from one of its methods, or from a block or a function that it is handed to. So the
caller is the *nearest* object among the arguments of the frames above the call that holds both the
transformer and a scheduler. No class and no method is touched for it.

What it cannot see: calls from another thread than the pipeline's, and loops of one's own in which
no such object is an argument. They have no caller.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

from torch import Tensor, nn

CALL_KEYS = (
    "height",
    "width",
    "num_frames",
    "guidance_scale",
    "guidance_scale_2",
    "true_cfg_scale",
    "strength",
    "max_sequence_length",
)
"""Arguments of a pipeline's call that change what the model computes, besides prompt and seed."""


def calling_pipeline(transformer: nn.Module) -> Any:
    """The pipeline whose call of `transformer` is under way in this thread, or None."""
    for frame in _frames():
        for value in _arguments(frame):
            held: Any = getattr(value, "__dict__", None)
            if (
                isinstance(held, dict)
                and held.get("scheduler") is not None
                and any(item is transformer for item in held.values())
            ):
                return value
    return None


def call_setting(pipe: Any) -> dict[str, bool | int | float]:
    """Of `CALL_KEYS`, what the call of `pipe` that is under way has; {} if none is.

    Values are those at this moment: a pipeline may have rounded a size or filled in a default.
    """
    found: dict[str, bool | int | float] = {}
    for frame in _frames():
        if frame.f_code.co_name != "__call__":
            continue
        if all(value is not pipe for value in _arguments(frame)):
            continue
        local = frame.f_locals
        # A modular pipeline keeps its arguments in a state.
        state = getattr(local.get("state"), "values", None)
        for source in (local, state if isinstance(state, Mapping) else {}):
            for key in CALL_KEYS:
                if isinstance(source.get(key), bool | int | float):
                    found.setdefault(key, source[key])
    return found


def latent_shape(sample: Tensor) -> list[int]:
    """Shape of the latent of one image, as the scheduler receives it: without the batch axis."""
    return list(sample.shape[1:])


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _arguments(frame: FrameType) -> list[Any]:
    code, local = frame.f_code, frame.f_locals
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return [local[name] for name in names if name in local]
