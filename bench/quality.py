"""PSNR of plans at fixed shares of compute, seen on validation prompts and predicted.

    python -m bench.quality --folder FOLDER [--weights DIR] [--json FILE] [--quick]
        [--settings 50 28] [--units step groups] [--shares 0.73 0.50]
        [--solver greedy --predictor published] [--no-responses]

For each setting of the reference model (50 steps with guidance, 28 without) statistics of
calibration prompts are measured, plans (by default, of whole steps and of groups alone) are
compiled from them at fixed shares of the transformer's compute, and each runs on validation
prompts. PSNR in dB against the uncached images of the same noise: mean, median and worst over
prompts.

It answers whether a change of LayerCache made plans better or worse, so it uses what a user has
and nothing else: `calibrate`, `compile_plan`, `apply_plan`. `FOLDER` keeps statistics and uncached
images for the next run; after a change of calibration, give another. 32 validation prompts resolve
about 0.7 dB. Nothing here sees a held-out prompt. `--no-responses` leaves out what calibration
measured of two groups at a time.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from layercache import Budget, CalibrationStats, Plan, compile_plan
from layercache.calibration import calibrate
from layercache.errors import BudgetError
from layercache.options import PREDICTORS, SOLVERS
from layercache.reference import call_arguments, load_pipeline, prompts
from layercache.reference.pipeline import WEIGHTS
from layercache.runtime import apply_plan

SHARES: dict[tuple[str, ...], tuple[float, ...]] = {
    ("step", "groups"): (0.73, 0.50, 0.33, 0.25),
    ("step",): (0.73, 0.50, 0.33, 0.25),
    ("groups",): (0.85, 0.73, 0.50, 0.33),
}
"""What may be cached, and the shares of the transformer's compute at which plans are compared."""

VALIDATION_SEED = 1_000_000
"""Noise of the first validation prompt; each prompt has its own, whatever the batch."""

CEILING_DB = 120.0


@dataclass(frozen=True)
class Setting:
    """A way to use the reference model, and how much of everything is run.

    Attributes:
        steps: T.
        guidance: Scale of classifier-free guidance; 1 is off.
        shift: Of the sigmas.
        calibration: Prompts that statistics are of.
        validation: Prompts that plans run on.
        batch: Prompts a pipeline call.
        lags: Lags that calibration measures.
        weights: Of the reference model.
    """

    steps: int
    guidance: float
    shift: float
    calibration: int = 16
    validation: int = 32
    batch: int = 16
    lags: int = 8
    weights: Path = WEIGHTS

    @property
    def arguments(self) -> dict[str, Any]:
        """Of a pipeline call, but prompt, noise and number of steps."""
        found = call_arguments(true_cfg_scale=self.guidance)
        del found["generator"], found["num_inference_steps"]
        if self.guidance <= 1:
            del found["negative_prompt"]
        return found

    def load(self) -> Any:
        """The reference pipeline with this setting's scheduler."""
        pipe = load_pipeline(self.weights)
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=self.shift)
        return pipe


SETTINGS = {
    "50": Setting(steps=50, guidance=4.0, shift=3.0),
    "28": Setting(steps=28, guidance=1.0, shift=2.0),
}
TINY: dict[str, Any] = {"calibration": 2, "validation": 2, "batch": 2, "lags": 2, "steps": 8}


def statistics_of(pipe: Any, setting: Setting, path: Path, progress: bool) -> CalibrationStats:
    """Statistics of the calibration prompts, measured where `path` does not hold them."""
    if not path.exists():
        calibrate(
            pipe,
            prompts("calibration", setting.calibration),
            num_inference_steps=setting.steps,
            groups=4,
            lags=setting.lags,
            seed=0,
            batch_size=setting.batch,
            call_kwargs=setting.arguments,
            progress=progress,
        ).save(path)
    return CalibrationStats.load(path)


def images_of(pipe: Any, setting: Setting) -> np.ndarray[Any, Any]:
    """(P, H, W, C) images of the validation prompts in [0, 1], as the pipeline is now."""
    texts = prompts("validation", setting.validation)
    found = []
    for start in range(0, len(texts), setting.batch):
        part = texts[start : start + setting.batch]
        arguments = setting.arguments
        if "negative_prompt" in arguments:
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(part)
        seeds = range(VALIDATION_SEED + start, VALIDATION_SEED + start + len(part))
        with torch.no_grad():
            result = pipe(
                prompt=part,
                num_inference_steps=setting.steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="np",
                **arguments,
            )
        found.append(np.asarray(result.images, dtype=np.float64))
    return np.concatenate(found)


def uncached_images(pipe: Any, setting: Setting, path: Path) -> np.ndarray[Any, Any]:
    """Images of the validation prompts without a plan, made where `path` does not hold them."""
    if not path.exists():
        np.save(path, images_of(pipe, setting))
    found: np.ndarray[Any, Any] = np.load(path)
    return found


def psnr(images: np.ndarray[Any, Any], references: np.ndarray[Any, Any]) -> list[float]:
    """PSNR of each image in dB, at most `CEILING_DB`."""
    difference = images.clip(0, 1) - references.clip(0, 1)
    errors = (difference**2).mean(axis=tuple(range(1, images.ndim)))
    return [float(v) for v in -10 * np.log10(np.maximum(errors, 10 ** (-CEILING_DB / 10)))]


def figures_of(plan: Plan, psnr_db: Sequence[float]) -> dict[str, Any]:
    """What is said of one plan."""
    return {
        "mean": statistics.fmean(psnr_db),
        "median": statistics.median(psnr_db),
        "worst": min(psnr_db),
        "psnr_db": list(psnr_db),
        "predicted": plan.to_dict()["predicted"],
        "plan": plan.to_dict(),
    }


def measure(
    setting: Setting,
    name: str,
    folder: Path,
    shares: Mapping[tuple[str, ...], Sequence[float]] = SHARES,
    options: Mapping[str, Any] | None = None,
    responses: bool = True,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Figures of every plan of one setting, by what may be cached and by share."""
    folder.mkdir(parents=True, exist_ok=True)
    pipe = setting.load()
    stats = statistics_of(pipe, setting, folder / f"stats_{name}.npz", progress=sys.stderr.isatty())
    if not responses:
        stats = replace(stats, responses=np.zeros(0), response_sigmas=np.zeros(0))
    references = uncached_images(pipe, setting, folder / f"uncached_{name}.npy")
    result: dict[str, Any] = {}
    for units, listed in shares.items():
        rows = result.setdefault("+".join(units), {})
        for share in listed:
            try:
                plan = compile_plan(stats, Budget(fraction=share), units=units, **(options or {}))
            except BudgetError as error:
                log(f"{name} {'+'.join(units):<12} {share:.2f}  no plan: {error}")
                continue
            with apply_plan(pipe, plan):
                seen = psnr(images_of(pipe, setting), references)
            row = rows[f"{share:.2f}"] = figures_of(plan, seen)
            log(line_of(name, units, share, row))
    return result


def line_of(name: str, units: Sequence[str], share: float, row: Mapping[str, Any]) -> str:
    """The figures of one plan for a person."""
    predicted = row["predicted"].get("psnr_db")
    foretold = f"{predicted:6.2f}" if isinstance(predicted, int | float) else str(predicted)
    return (
        f"{name:<3} {'+'.join(units):<12} {share:.2f}  mean {row['mean']:6.2f}  "
        f"median {row['median']:6.2f}  worst {row['worst']:6.2f}  predicted {foretold}"
    )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="keeps statistics and images")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="of bench.reference.train")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--quick", action="store_true", help="a small run, for a smoke test")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--units", nargs="+", choices=("step", "groups"), help="of one kind alone")
    parser.add_argument("--shares", nargs="+", type=float, help="of full compute")
    parser.add_argument("--predictor", choices=PREDICTORS, default="fitted")
    parser.add_argument("--solver", choices=SOLVERS, default="search")
    parser.add_argument("--no-responses", action="store_true", help="groups as measured one by one")
    chosen = parser.parse_args()
    log = functools.partial(print, flush=True)
    shares = {
        units: chosen.shares or listed
        for units, listed in SHARES.items()
        if not chosen.units or set(units) == set(chosen.units)
    }
    found = {}
    for name in chosen.settings:
        setting = replace(SETTINGS[name], weights=chosen.weights, **(TINY if chosen.quick else {}))
        found[name] = measure(
            setting,
            name,
            chosen.folder,
            shares=shares,
            options={"predictor": chosen.predictor, "solver": chosen.solver},
            responses=not chosen.no_responses,
            log=log,
        )
        if chosen.json is not None:
            chosen.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
