"""Results on disk, one file each, so that a killed bench goes on where it stopped.

A result's file name carries a digest of all that it depends on: the scenario, the weights, the
machine, the versions, the code that runs, the prompts, and the method's own setting. A change of
any of them makes another name, so nothing stale is read; files that no run asks for any more stay
behind.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import platform
import re
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bench.comparison.scenario import Scenario
from layercache._write import write_file
from layercache.plan import Plan

_ROOT = Path(__file__).resolve().parents[2]
_RUNNING_CODE = (
    "bench/comparison/work.py",
    "bench/peers",
    "layercache/calibration",
    "layercache/evaluation/_latency.py",
    "layercache/evaluation/metrics.py",
    "layercache/evaluation/peers",
    "layercache/models",
    "layercache/reference",
    "layercache/runtime",
)
_VERSIONS = ("torch", "diffusers", "transformers", "torchmetrics", "cache-dit")


class Store:
    """A folder of results under one fingerprint."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, title: str, *parts: Any, suffix: str = ".json") -> Path:
        """Where a result lies: its title, readable, and the digest of all that it depends on."""
        slug = re.sub(r"[^a-z0-9.]+", "-", title.lower()).strip("-")[:60]
        return self.folder / f"{slug}-{digest(self.fingerprint, title, *parts)[:16]}{suffix}"

    def read(self, path: Path) -> Any:
        """The JSON value of a file, or None where there is none."""
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def write(self, path: Path, value: Any) -> None:
        """Write a JSON value; a reader sees all of it or nothing."""
        text = json.dumps(value, indent=1, allow_nan=False) + "\n"
        write_file(path, text.encode())

    def kept(self, title: str, parts: Any, compute: Callable[[], Any]) -> Any:
        """The JSON value kept under a title, computed where it is not there yet."""
        path = self.path(title, parts)
        found = self.read(path)
        if found is None:
            found = json.loads(json.dumps(compute(), allow_nan=False))
            self.write(path, found)
        return found

    def kept_arrays(
        self, title: str, parts: Any, compute: Callable[[], Mapping[str, NDArray[Any]]]
    ) -> dict[str, NDArray[Any]]:
        """The same for named arrays, in an `.npz` file."""
        path = self.path(title, parts, suffix=".npz")
        if not path.exists():
            stream = io.BytesIO()
            np.savez(stream, **compute())  # type: ignore[arg-type]
            write_file(path, stream.getvalue())
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}


def digest(*parts: Any) -> str:
    """SHA-256 of nested values: numbers, strings, arrays, dataclasses, plans."""
    text = json.dumps([plain(part) for part in parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def plain(value: Any) -> Any:
    """A JSON value that stands for `value` and changes with it."""
    if isinstance(value, Plan):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", str(value))


def fingerprint(scenario: Scenario, pipe: Any) -> str:
    """Digest of all that every result depends on; prompts and settings come with each result."""
    return digest(
        scenario,
        weights_digest(pipe.transformer),
        {name: _version(name) for name in _VERSIONS},
        [platform.platform(), platform.machine(), os.cpu_count(), torch.get_num_threads()],
        code_digest(),
    )


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of all parameters and buffers."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def code_digest() -> str:
    """SHA-256 of the sources that run while something is measured."""
    total = hashlib.sha256()
    for part in _RUNNING_CODE:
        place = _ROOT / part
        for file in [place] if place.is_file() else sorted(place.rglob("*.py")):
            total.update(file.read_bytes())
    return total.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
