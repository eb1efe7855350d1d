"""Bytes of tensors that come into being while something runs: the peak above what was there before.

On a GPU the caching allocator counts. Elsewhere every operation's new storage is counted when it
appears and when it is freed, which leaves out the scratch space inside an operation.
"""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from layercache.models._foreign import TorchDispatchMode, storage_key, tree_leaves


class PeakMemory:
    """Watches one device within a `with` block.

    Example:
        >>> with PeakMemory(torch.device("cpu")) as memory:
        ...     kept = torch.ones(1000)
        ...     passing = kept + 1
        ...     del passing
        >>> memory.peak, memory.live
        (8000, 4000)
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # `Any`, since torch's dispatch modes carry no types.
        self._storages: Any = None if device.type == "cuda" else _Storages(device)
        self._base = self._peak = 0

    def __enter__(self) -> Self:
        if self._storages is not None:
            self._storages.__enter__()
        else:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._base = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.lap()
        if self._storages is not None:
            self._storages.__exit__(kind, error, trace)

    @property
    def live(self) -> int:
        """Bytes now, above those at the start."""
        if self._storages is not None:
            return int(self._storages.live)
        return torch.cuda.memory_allocated(self._device) - self._base

    @property
    def peak(self) -> int:
        """Largest number of bytes so far, above those at the start."""
        return max(self._peak, self._since_lap())

    def lap(self) -> int:
        """Peak since the last lap, above the start; the next lap begins."""
        found = self._since_lap()
        self._peak = max(self._peak, found)
        if self._storages is not None:
            self._storages.peak = self._storages.live
        else:
            torch.cuda.reset_peak_memory_stats(self._device)
        return found

    def _since_lap(self) -> int:
        if self._storages is not None:
            return int(self._storages.peak)
        return torch.cuda.max_memory_allocated(self._device) - self._base


class _Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations return and that none of their arguments had."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._known: dict[int, int] = {}
        self.live = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if tensors:
            given = {
                storage_key(leaf.untyped_storage())
                for leaf in tree_leaves((args, kwargs))
                if isinstance(leaf, Tensor)
            }
            for tensor in tensors:
                self._count(tensor, given)
        return output

    def _count(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        if key in given or key in self._known or tensor.device.type != self._device.type:
            return
        self._known[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)
