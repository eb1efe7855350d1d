"""What a run has to notice besides calls of the transformer and of the scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
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
        self._bar, self._on_end = bar, on_end

    def __enter__(self) -> Any:
        return self._bar.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> Any:
        self._on_end(self)
        return self._bar.__exit__(kind, error, trace)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._bar
        finally:
            self._on_end(self)

    def __len__(self) -> int:
        return len(self._bar)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)


class Loops:
    """The denoising loops that a pipeline has open.

    Args:
        on_open: Called when one is opened and none is followed, in which a run may go on.
        on_end: Called when the loop that `follow` chose is left.
    """

    def __init__(self, on_open: Callable[[], None], on_end: Callable[[], None]) -> None:
        self._on_open, self._on_end = on_open, on_end
        self._open: list[Loop] = []
        self._followed: Loop | None = None

    def opened(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Loop:
        """In the place of a pipeline's `progress_bar`."""
        loop = Loop(inner(*args, **kwargs), self._left)
        self._open.append(loop)
        if self._followed is None:
            self._followed = loop
            self._on_open()
        return loop

    def follow(self) -> None:
        """A run begins, in the loop that was opened last."""
        self._followed = self._open[-1] if self._open else None

    def _left(self, loop: Loop) -> None:
        if loop in self._open:
            self._open.remove(loop)
        if loop is self._followed:
            self._followed = None
            self._on_end()
