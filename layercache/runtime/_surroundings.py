"""What a run has to notice besides calls of the transformer and of the scheduler."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

# Methods after which stored tensors belong to another model: of the transformer (diffusers' PEFT
# mixin) and of the pipeline.
MODEL_CHANGES = (
    "add_adapter",
    "delete_adapters",
    "disable_adapters",
    "disable_lora",
    "enable_adapters",
    "enable_lora",
    "fuse_lora",
    "load_lora_adapter",
    "set_adapter",
    "set_adapters",
    "set_attention_backend",
    "reset_attention_backend",
    "unfuse_lora",
    "unload_lora",
)
PIPELINE_CHANGES = ("load_ip_adapter", "set_ip_adapter_scale", "unload_ip_adapter")


class Loop:
    """A pipeline's progress bar, which every diffusers pipeline opens around its denoising loop.

    It behaves as the bar does, and tells when the loop is left, by an exception or otherwise.
    """

    def __init__(self, bar: Any, on_end: Callable[[Loop], None]) -> None:
        self._bar = bar
        self.thread = threading.get_ident()
        self.on_end = [on_end]

    def __enter__(self) -> Any:
        return self._bar.__enter__()

    def __exit__(self, *error: Any) -> Any:
        self._ended()
        return self._bar.__exit__(*error)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._bar
        finally:
            self._ended()

    def __len__(self) -> int:
        return len(self._bar)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)

    def _ended(self) -> None:
        while self.on_end:
            self.on_end.pop()(self)


class Loops:
    """The denoising loops that pipelines have open, so that what they leave behind is freed."""

    def __init__(self) -> None:
        self._open: list[Loop] = []

    def opened(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Loop:
        """In the place of a pipeline's `progress_bar`."""
        loop = Loop(inner(*args, **kwargs), self._open.remove)
        self._open.append(loop)
        return loop

    def innermost(self, on_end: Callable[[Loop], None]) -> Loop | None:
        """The loop that this thread opened last, and whose end is to be told; None without one."""
        for loop in reversed(self._open):
            if loop.thread == threading.get_ident():
                loop.on_end.append(on_end)
                return loop
        return None
