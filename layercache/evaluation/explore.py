"""`explore`: one self-contained page on which a person chooses a plan.

What it shows is compiled before the page is written: a plan at each of some shares of the compute.
The page (`explore.html`) only draws, and saves the plan that was chosen.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from layercache._json import parse
from layercache.choices import frontier
from layercache.errors import LayerCacheError
from layercache.options import Options
from layercache.paying import paying
from layercache.plan import Plan
from layercache.stats import CalibrationStats

SHARES = (0.9, 0.8, 0.73, 0.65, 0.58, 0.5, 0.45, 0.4, 0.36, 0.33, 0.29, 0.25, 0.22, 0.2)
_MOST_IMAGE_BYTES = 32 * 2**20


def explore_page(
    stats: CalibrationStats,
    *,
    shares: Sequence[float] = SHARES,
    options: Options | None = None,
    evaluations: Sequence[Path] = (),
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """The page as HTML: no network, no other files.

    Args:
        stats: Calibration statistics.
        shares: Of the transformer's compute, for which plans are compiled; those that cannot be met
            are left out.
        options: How plans are compiled.
        evaluations: Folders that `layercache eval --out` wrote: what was measured is drawn beside
            what is foretold, and images are shown.
        progress: Called with how many of how many levels are searched.

    Raises:
        BudgetError: None of the shares can be met.
        LayerCacheError: A folder holds no evaluation.
    """
    measured = [_measured(folder) for folder in evaluations]
    plans = frontier(stats, shares, options, progress=progress)
    data = {
        "title": f"{stats.model.get('class_name', 'Model')}, {stats.num_steps} steps",
        "facts": _facts(stats, plans[0]),
        "plans": [_plan(plan) for plan in plans],
        "paying": _paying(stats),
        "measured": measured,
    }
    text = json.dumps(data, allow_nan=False, ensure_ascii=False).replace("</", "<\\/")
    page = files("layercache.evaluation").joinpath("explore.html").read_text(encoding="utf-8")
    return page.replace("{{data}}", text)


def _facts(stats: CalibrationStats, plan: Plan) -> dict[str, str]:
    return {
        "Made for": plan.made_for,
        "Calibrated on": f"{stats.num_prompts} prompts",
        "A full step": f"{float(stats.group_ms.sum()) + stats.rest_ms:.1f} ms in the transformer, "
        f"{stats.overhead_ms:.1f} ms outside it, on the machine that calibrated",
    }


def _plan(plan: Plan) -> dict[str, Any]:
    rows = []
    for unit in plan.units:
        schedule = plan.schedules[unit.name]
        if unit.kind == "group" and not any(schedule.cached):
            continue  # It runs wherever the step does.
        rows.append(
            {"name": unit.name, "cells": unit.cells, "reads": [len(r) for r in schedule.reads]}
        )
    predicted = plan.predicted.model_dump()
    return {"rows": rows, "predicted": predicted, "file": plan.to_bytes().decode()}


def _paying(stats: CalibrationStats) -> dict[str, Any]:
    found = paying(stats)
    return {
        "groups": list(found.groups),
        "share": [round(float(share), 4) for share in found.share],
        "ratio": [round(float(ratio), 4) for ratio in found.ratio],
        "map": np.round(found.map.T, 4).tolist(),
        "sigmas": [round(float(sigma), 4) for sigma in stats.sigmas],
    }


def _measured(folder: Path) -> dict[str, Any]:
    """The first row of an evaluation's results, and its sheet of images."""
    try:
        results = parse((folder / "results.json").read_bytes())
        row = results["rows"][0]
        measured = {
            "name": folder.name + (" (timing unclear)" if row.get("timing_doubt") else ""),
            "share": float(row["compute_share"]),
            "speedup": float(row["speedup_measured"]),
            "psnr": float(row["psnr_median"]),
            "worst": float(row["psnr_worst"]),
            "images": int(results["images"]),
        }
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        what = "has no results.json" if isinstance(error, OSError) else "holds no evaluation"
        raise LayerCacheError(
            f"{folder} {what}: pass a folder that `layercache eval --out` wrote"
        ) from error
    sheet = folder / "sheet.png"
    if sheet.is_file() and sheet.stat().st_size <= _MOST_IMAGE_BYTES:
        measured["sheet"] = base64.b64encode(sheet.read_bytes()).decode()
    return measured
