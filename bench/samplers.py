"""Predicted and seen PSNR of plans under Euler's method, UniPC and DPM++, on the reference model.

    python -m bench.samplers [--steps 20] [--calibration 4] [--validation 8] [--json] [--quick]

The question is whether a plan's figures are as true under one sampler as under another. For each,
statistics of calibration prompts are measured, default plans are compiled at 1.5x and 2x, and run
on validation prompts; `fewer steps` is the same sampler at as many steps as the plan computes. PSNR
in dB against the uncached images of the same sampler, means over prompts. Nothing here sees a
held-out prompt.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from layercache import Budget, compile_plan
from layercache.calibration import calibrate
from layercache.reference import call_arguments, load_pipeline, prompts
from layercache.runtime import apply_plan

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SAMPLERS = {
    "Euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "UniPC": lambda: UniPCMultistepScheduler(**FLOW),
    "DPM++ 2M": lambda: DPMSolverMultistepScheduler(**FLOW),
}
SPEEDUPS = (1.5, 2.0)
SETTING = {"negative_prompt": "", "true_cfg_scale": 4.0, "height": 32, "width": 32}
SEED = 1_000_000


@contextmanager
def own_sigmas() -> Iterator[None]:
    """QwenImagePipeline with the scheduler's own sigmas, as the pipelines of Wan and Sana do."""

    def retrieve(
        scheduler: Any, n: int | None = None, device: Any = None, sigmas: Any = None, mu: Any = None
    ) -> tuple[Any, int]:
        scheduler.set_timesteps(n or len(sigmas), device=device)
        return scheduler.timesteps, len(scheduler.timesteps)

    place = "diffusers.pipelines.qwenimage.pipeline_qwenimage.retrieve_timesteps"
    with mock.patch(place, retrieve):
        yield


def psnr(images: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """Of each image, in dB."""
    error = (images - reference).flatten(1).double().pow(2).mean(1)
    return (-10 * torch.log10(error.clamp_min(1e-12))).tolist()


def measure(name: str, steps: int, calibration: int, validation: int) -> list[dict[str, Any]]:
    """A row a speedup, of one sampler."""
    pipe = load_pipeline()
    pipe.scheduler = SAMPLERS[name]()
    stats = calibrate(
        pipe,
        prompts("calibration", calibration),
        num_inference_steps=steps,
        batch_size=calibration,
        call_kwargs=SETTING,
        progress=False,
    )
    texts, seeds = prompts("validation", validation), [SEED + i for i in range(validation)]

    def images(count: int) -> torch.Tensor:
        arguments = call_arguments(seeds, num_inference_steps=count, output_type="pt")
        found: torch.Tensor = pipe(texts, **arguments).images
        return found

    reference = images(steps)
    rows = []
    for speedup in SPEEDUPS:
        plan = compile_plan(stats, Budget(speedup=speedup))
        with apply_plan(pipe, plan):
            seen = psnr(images(steps), reference)
        fewer = psnr(images(sum(plan.run_steps)), reference)
        rows.append(
            {
                "sampler": name,
                "speedup": speedup,
                "computed": sum(plan.run_steps),
                "predicted": plan.predicted.psnr_db,
                "seen": float(np.mean(seen)),
                "median": float(np.median(seen)),
                "fewer_steps": float(np.mean(fewer)),
            }
        )
    return rows


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['sampler']:<10}{row['speedup']:>4.1f}x  {row['computed']:>3} computed"
        f"  predicted {row['predicted']:5.1f}  seen {row['seen']:5.1f}"
        f"  median {row['median']:5.1f}  fewer steps {row['fewer_steps']:5.1f}"
    )


def main() -> None:
    """Measure every sampler and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--calibration", type=int, default=4)
    parser.add_argument("--validation", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sizes = (6, 1, 1) if options.quick else (options.steps, options.calibration, options.validation)
    rows: list[dict[str, Any]] = []
    with own_sigmas():
        for name in SAMPLERS:
            for row in measure(name, *sizes):
                rows.append(row)
                if not options.json:
                    print(_line(row), flush=True)
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
