"""Checkpoints that a kill in the middle of writing does not spoil."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save_atomically(path: Path, state: Any) -> None:
    """Write beside the file, then move: what is at `path` is always whole."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)
