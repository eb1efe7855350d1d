"""The files of a run: checkpoints that a kill does not spoil, and the names of the pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def save_atomically(path: Path, state: Any) -> None:
    """Write beside the file, then move: what is at `path` is always whole."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def write_names(folder: Path, known: Sequence[str], trained: Sequence[str]) -> None:
    """Keep which pictures the vocabulary holds, and which of them the model has seen."""
    text = json.dumps({"known": list(known), "trained": list(trained)}, indent=1)
    (folder / "names.json").write_text(text + "\n")


def read_names(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the pictures that the vocabulary holds, and of those that were trained on."""
    names = json.loads((folder / "names.json").read_text())
    return names["known"], names["trained"]
