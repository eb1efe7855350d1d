"""The whole job on the reference model: calibrate, compile, run, compare, report."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layercache.calibration import calibrate
from layercache.calibration.prompts import Batch, batches
from layercache.compile import pareto
from layercache.evaluation._artifacts import write_artifacts
from layercache.evaluation._compare import Comparison, compare
from layercache.evaluation._contenders import Contenders
from layercache.evaluation._trajectories import collect_trajectories
from layercache.plan import Budget, Plan
from layercache.reference import call_arguments, load_pipeline, prompts
from layercache.reference.pipeline import STEPS, WEIGHTS
from layercache.reference.prompts import Split
from layercache.stats import CalibrationStats

TARGETS = (1.37, 2.0, 3.0)
SEEDS = {"calibration": 0, "validation": 1, "held-out": 2}


@dataclass(frozen=True)
class DemoSize:
    """How much the demo does: steps, prompts of each split and of a call, lags that are measured.

    `screened` of MeanCache's schedules run on the validation prompts.
    """

    steps: int = STEPS
    calibration: int = 8
    validation: int = 4
    held_out: int = 16
    batch: int = 8
    lags: int = 8
    screened: int = 3


@dataclass(frozen=True)
class DemoResult:
    """What the demo found, and the files that it wrote."""

    comparison: Comparison
    plans: dict[float, Plan]
    files: tuple[Path, ...]
    seconds: float


def run_demo(
    out: Path,
    *,
    weights: Path | None = None,
    targets: tuple[float, ...] = TARGETS,
    size: DemoSize | None = None,
    log: Callable[[str], None] = lambda text: None,
    progress: bool = True,
) -> DemoResult:
    """Do the job and write `out/`: statistics, plans, pictures, `results.json`, `report.html`.

    Args:
        out: Folder to write; made where it is missing.
        weights: Folder of another set of weights of the reference model.
        targets: Target speedups, as factors of transformer compute.
        size: How much to do; the default takes three to six minutes on two cores.
        log: Receives a line at the start of every stage.
        progress: Show progress bars on stderr.
    """
    size = size or DemoSize()
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(weights or WEIGHTS)
    arguments = call_arguments(num_inference_steps=size.steps)
    del arguments["generator"]

    log(f"calibrating on {size.calibration} prompts")
    stats = _calibrated(pipe, size, arguments, progress)
    stats.save(out / "stats.npz")

    log("compiling plans")
    budgets = [Budget(fraction=1 / target) for target in targets]
    plans = dict(zip(targets, pareto(stats, budgets), strict=True))
    files = [out / "stats.npz"]
    for target, plan in plans.items():
        files.append(out / f"plan-{target:g}x.json")
        plan.save(files[-1])
        log(plan.summary())

    log("preparing the methods to compare with")

    contenders = Contenders(
        pipe,
        stats,
        collect_trajectories(pipe, _work("calibration", size.calibration, size, arguments)),
        _work("validation", size.validation, size, arguments),
        screened=size.screened,
        log=log,
    )
    methods = {target: contenders.build(target, plan) for target, plan in plans.items()}

    log(f"running every method on {size.held_out} held-out prompts")
    held_out = _work("held-out", size.held_out, size, arguments)
    comparison = compare(pipe, held_out, methods, warm_up=False, progress=progress)

    seconds = time.perf_counter() - began
    files += write_artifacts(
        out,
        comparison,
        plans,
        prompts("held-out", size.held_out),
        _facts(pipe, size, comparison) | {"Duration": f"{seconds:.0f} s before this report"},
        title="LayerCache on its reference model",
    )
    return DemoResult(comparison, plans, tuple(files), seconds)


def _calibrated(
    pipe: Any, size: DemoSize, arguments: dict[str, Any], progress: bool
) -> CalibrationStats:
    return calibrate(
        pipe,
        prompts("calibration", size.calibration),
        num_inference_steps=size.steps,
        groups=4,
        lags=size.lags,
        seed=SEEDS["calibration"],
        batch_size=size.batch,
        call_kwargs=arguments,
        progress=progress,
    )


def _work(split: Split, count: int, size: DemoSize, arguments: dict[str, Any]) -> list[Batch]:
    return batches(prompts(split, count), SEEDS[split], size.batch, arguments)


def _facts(pipe: Any, size: DemoSize, comparison: Comparison) -> dict[str, str]:
    config = pipe.transformer.config
    return {
        "Model": f"{type(pipe.transformer).__name__}, {config.num_layers} blocks, the reference "
        "model that ships with the package; its figures say nothing about other checkpoints",
        "Generation": f"{size.steps} steps, two transformer calls a step (guidance), float32",
        "Prompts": f"{size.calibration} to calibrate, {size.validation} to choose MeanCache's "
        f"schedule, {size.held_out} held out and reported; one seed each",
        "Timing": f"batches of {comparison.batch_size}, warm, methods in turns; uncached median "
        f"{comparison.uncached_seconds:.2f} s a batch",
        "Machine": f"{platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}",
    }
