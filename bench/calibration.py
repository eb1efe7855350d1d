"""What calibration takes: time in full generations, and peak memory against the stated bound.

    python -m bench.calibration [--json] [--quick]

On the reference model, 50 steps, 4 groups, 8 lags:

- `generations_replay`, `generations_residual`: time of a calibration over that of as many uncached
  generations in the same batches, everything included (estimate, perturbed runs, decoding). One
  thread, processor time, so that other work on the machine does not count; the largest over batch
  sizes. `wall_generations_*` has the same by the clock.
- `estimated_over_measured_s`: seconds that the estimate foretold over those it took.
- `peak_over_bound`: peak bytes above the model over the bound stated before the run; the largest
  over modes, batch sizes and bounds (at fewer steps, on which the peak does not depend).
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import torch

from layercache.calibration import calibrate, estimate_calibration
from layercache.calibration._memory import PeakMemory
from layercache.calibration.prompts import batches
from layercache.models.pipelines import run_pipeline
from layercache.reference import call_arguments, load_pipeline, prompts

MODES = ("replay", "residual")


def spent(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the processor and of the clock."""
    processor, clock = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - processor, time.perf_counter() - clock


def times(pipe: Any, setting: dict[str, Any], steps: int, batch: int) -> dict[str, Any]:
    """One batch: generations before, between and after the calibrations of both modes."""
    texts = prompts("calibration", batch)
    options: dict[str, Any] = {
        "num_inference_steps": steps,
        "batch_size": batch,
        "call_kwargs": setting,
    }
    plain = batches(texts, 0, batch, setting | {"num_inference_steps": steps})[0]

    def generate() -> None:
        with torch.no_grad():
            run_pipeline(pipe, plain.arguments)

    generate()
    generations, found = [spent(generate)], {}
    for mode in MODES:
        estimate = estimate_calibration(pipe, texts, mode=mode, **options)
        run = functools.partial(calibrate, pipe, texts, mode=mode, progress=False, **options)
        taken = spent(run)
        generations.append(spent(generate))
        found[mode] = (taken, estimate)
    processor = sum(g[0] for g in generations) / len(generations)
    clock = sum(g[1] for g in generations) / len(generations)
    return {
        "batch": batch,
        **{f"generations_{mode}": found[mode][0][0] / processor for mode in MODES},
        **{f"wall_generations_{mode}": found[mode][0][1] / clock for mode in MODES},
        **{
            f"estimated_over_measured_s_{mode}": found[mode][1].seconds / found[mode][0][1]
            for mode in MODES
        },
    }


def memory(
    pipe: Any, setting: dict[str, Any], steps: int, batch: int, mode: str, tight: bool
) -> dict[str, Any]:
    """Peak of one calibration against its bound; `tight` allows as little as can be."""
    texts = prompts("calibration", batch)
    options: dict[str, Any] = {
        "num_inference_steps": steps,
        "batch_size": batch,
        "mode": mode,
        "call_kwargs": setting,
    }
    stated = estimate_calibration(pipe, texts, **options)
    if tight:
        # Halve until it is refused, then keep the smallest that was accepted.
        limit = stated.peak_bytes
        while True:
            try:
                stated = estimate_calibration(pipe, texts, max_memory=limit, **options)
            except ValueError:
                break
            limit = int(0.8 * min(limit, stated.peak_bytes))
        options["max_memory"] = stated.peak_bytes
    with PeakMemory(torch.device("cpu")) as watched:
        calibrate(pipe, texts, progress=False, **options)
    return {
        "batch": batch,
        "mode": mode,
        "lags_together": stated.lags_together,
        "peak_mb": watched.peak / 1e6,
        "bound_mb": stated.peak_bytes / 1e6,
        "peak_over_bound": watched.peak / stated.peak_bytes,
    }


def measure(quick: bool) -> dict[str, Any]:
    """All figures."""
    torch.set_num_threads(1)
    pipe = load_pipeline()
    setting = call_arguments()
    del setting["generator"], setting["num_inference_steps"]
    sizes, steps, watched_steps = ((1,), 3, 3) if quick else ((1, 8), 50, 12)
    rows = [times(pipe, setting, steps, batch) for batch in sizes]
    peaks = [
        memory(pipe, setting, watched_steps, batch, mode, tight)
        for batch in sizes
        for mode in MODES
        for tight in ((False, True) if mode == "replay" and not quick else (False,))
    ]
    largest = {
        name: max(row[name] for row in rows)
        for kind in ("generations", "wall_generations")
        for name in (f"{kind}_{mode}" for mode in MODES)
    }
    return {
        **largest,
        "peak_over_bound": max(peak["peak_over_bound"] for peak in peaks),
        "times": rows,
        "memory": peaks,
    }


def report(figures: dict[str, Any]) -> str:
    """The figures as a table for a person."""
    lines = ["calibration in full generations (processor time, one thread; by the clock)"]
    for row in figures["times"]:
        cells = "   ".join(
            f"{mode} {row[f'generations_{mode}']:.1f} ({row[f'wall_generations_{mode}']:.1f}; "
            f"estimate/measured {row[f'estimated_over_measured_s_{mode}']:.2f})"
            for mode in MODES
        )
        lines.append(f"  batch {row['batch']}: {cells}")
    lines.append("peak memory above the model, and the bound stated before the run")
    for peak in figures["memory"]:
        lines.append(
            f"  batch {peak['batch']}, {peak['mode']:<8} {peak['lags_together']} lags together: "
            f"{peak['peak_mb']:.1f} MB of {peak['bound_mb']:.1f} MB "
            f"({peak['peak_over_bound']:.2f})"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="a small run, for a smoke test")
    chosen = parser.parse_args()
    figures = measure(chosen.quick)
    print(json.dumps(figures) if chosen.json else report(figures))


if __name__ == "__main__":
    main()
