"""PSNR of plans under Euler's method, UniPC, DPM++ and Heun's method, on the reference model.

    python -m bench.samplers [--calibration 16] [--validation 32] [--json] [--quick]

For each sampler, statistics of calibration prompts are measured at 50 steps, plans that compute 25
and 16 of them are compiled, and run on validation prompts. `fewer steps` is the same sampler at as
many model calls as the plan makes, or the next number that it can make. PSNR in dB against the
images of the same sampler at all its steps. Nothing here sees a held-out prompt.
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
    FlowMatchHeunDiscreteScheduler,
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
    "Heun": lambda: FlowMatchHeunDiscreteScheduler(shift=3.0),
}
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


def fewer(calls: int, passes: int) -> int:
    """At how many steps a sampler makes at least so many calls: all of its steps, the last once."""
    return calls if passes == 1 else calls // 2 + 1


def measure(
    name: str, steps: int, budgets: tuple[int, ...], calibration: int, validation: int
) -> list[dict[str, Any]]:
    """A row a budget, of one sampler."""
    pipe = load_pipeline()
    pipe.scheduler = SAMPLERS[name]()
    stats = calibrate(
        pipe,
        prompts("calibration", calibration),
        num_inference_steps=steps,
        groups=0,
        batch_size=min(calibration, 8),
        call_kwargs=SETTING,
        progress=False,
    )
    texts, seeds = prompts("validation", validation), [SEED + i for i in range(validation)]

    def images(count: int) -> torch.Tensor:
        arguments = call_arguments(seeds, num_inference_steps=count, output_type="pt")
        found: torch.Tensor = pipe(texts, **arguments).images
        return found

    reference = images(steps)
    full = stats.passes * (steps - 1) + 1
    rows = []
    for calls in budgets:
        plan = compile_plan(stats, Budget(fraction=(calls + 0.01) / full))
        with apply_plan(pipe, plan):
            seen = psnr(images(steps), reference)
        count = fewer(calls, stats.passes)
        rival = psnr(images(count), reference)
        rows.append(
            {
                "sampler": name,
                "calls": sum(plan.run_steps),
                "calls_of": full,
                "predicted": plan.predicted.psnr_db,
                "predicted_median": plan.predicted.psnr_median_db,
                "seen": float(np.mean(seen)),
                "median": float(np.median(seen)),
                "worst": float(np.min(seen)),
                "fewer_steps": float(np.mean(rival)),
                "fewer_median": float(np.median(rival)),
                "fewer_calls": stats.passes * (count - 1) + 1,
            }
        )
    return rows


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['sampler']:<9}{row['calls']:>3} of {row['calls_of']:>2} calls"
        f"  seen {row['seen']:5.1f} median {row['median']:5.1f} worst {row['worst']:5.1f}"
        f"  predicted {row['predicted']:5.1f} median {row['predicted_median']:5.1f}"
        f"  fewer steps ({row['fewer_calls']} calls) {row['fewer_steps']:5.1f}"
        f" median {row['fewer_median']:5.1f}"
    )


def main() -> None:
    """Measure every sampler and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", type=int, default=16)
    parser.add_argument("--validation", type=int, default=32)
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    steps, budgets = (6, (3,)) if options.quick else (50, (25, 16))
    sizes = (1, 1) if options.quick else (options.calibration, options.validation)
    rows: list[dict[str, Any]] = []
    with own_sigmas():
        for name in SAMPLERS:
            for row in measure(name, steps, budgets, *sizes):
                rows.append(row)
                if not options.json:
                    print(_line(row), flush=True)
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
