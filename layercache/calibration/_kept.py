"""Outputs of transformer calls, kept until the pipeline is run again: in memory, then on disk."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from layercache.calibration._jobs import Replay
from layercache.models.tensors import map_tensors, tensor_bytes, tensors_in

Key = tuple[int, int, Replay | None]
"""(step, number of the call within it, the replay or None for the call itself)."""


class Kept:
    """Keeps copies on the CPU, of `limit` bytes at most in memory and the others in files.

    Example:
        >>> kept = Kept(limit=8)
        >>> kept.put((0, 0, None), torch.ones(2)); kept.put((1, 0, None), torch.zeros(2))
        >>> kept.held, kept.get((1, 0, None))
        (8, tensor([0., 0.]))
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._values: dict[Key, Any] = {}
        self._files: dict[Key, Path] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.held = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._values

    def put(self, key: Key, output: Any) -> None:
        """Keep a copy of a model's output."""
        size = tensor_bytes(output)
        copied = map_tensors(lambda tensor: tensor.detach().to("cpu", copy=True), output)
        if self.held + size <= self._limit:
            self._values[key] = copied
            self.held += size
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="layercache-")
        path = Path(self._folder.name) / f"{len(self._files)}.pt"
        # Tensors alone, which torch reads back without running code from the file.
        torch.save(tensors_in(copied), path)
        self._files[key] = path
        self._values[key] = map_tensors(lambda tensor: tensor.to("meta"), copied)

    def get(self, key: Key, device: torch.device | None = None) -> Any:
        """A copy of what was kept, on a device, of the model's own type."""
        value, place = self._values[key], device or torch.device("cpu")
        if key in self._files:
            read = iter(torch.load(self._files[key], weights_only=True))
            return map_tensors(lambda _: next(read).to(place), value)
        # Copies, since pipelines may write into what the transformer returned to them.
        return map_tensors(lambda tensor: tensor.to(place, copy=True), value)

    def close(self) -> None:
        """Drop everything."""
        self._values.clear()
        self._files.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
