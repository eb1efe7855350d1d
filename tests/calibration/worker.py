"""Processes that calibrate a tiny pipeline and may be killed: for tests of parts and of shards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from layercache.calibration import calibrate
from layercache.calibration.sharding import is_main_process
from layercache.stats import CalibrationStats
from tests.tiny import tiny_arguments, tiny_pipeline

SHAPES = ("circle", "square", "triangle", "ring", "star", "cross")
PROMPTS = [f"a large {colour} {shape}" for colour in ("red", "blue") for shape in SHAPES[:4]]


def calibrate_tiny(parts: Path | None, prompts: Any = PROMPTS, **options: Any) -> CalibrationStats:
    """A calibration of a few steps, one prompt a batch unless said otherwise."""
    return calibrate(
        tiny_pipeline(),
        prompts,
        num_inference_steps=4,
        groups=2,
        lags=2,
        call_kwargs=tiny_arguments(),
        parts=parts,
        progress=False,
        **options,
    )


def run(parts: str) -> None:
    """What a child process of the kill test does."""
    torch.set_num_threads(1)
    calibrate_tiny(Path(parts))


if __name__ == "__main__":
    # One of the processes of a launcher: write what this process got, for the test to compare.
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    stats = calibrate_tiny(None, batch_size=int(sys.argv[2]))
    stats.save(out / ("main.npz" if is_main_process() else "other.npz"))
