"""The files that a comparison leaves behind: pictures, `results.json`, `report.html`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from layercache._write import write_file
from layercache.evaluation._compare import Comparison
from layercache.evaluation._report import html_report
from layercache.evaluation._sheets import image_sheet
from layercache.evaluation.plots import pareto, plan_heat_map
from layercache.plan import Plan


def write_artifacts(
    out: Path,
    comparison: Comparison,
    plans: Mapping[float, Plan],
    prompts: Sequence[str],
    facts: Mapping[str, str],
    *,
    title: str,
) -> list[Path]:
    """Write `sheet.png`, `plan.png`, `pareto.png`, `report.html` and `results.json` into `out`.

    `plans` are those of each target, `prompts` the captions of the images in their order, and
    `facts` say what was run and on what. There is no sheet of a comparison of latents. Returns the
    files, in the order above.
    """
    pictures = {"sheet": image_sheet(comparison, prompts)} if comparison.decoded else {}
    pictures |= {
        "plan": plan_heat_map({f"{target:g}x": plan for target, plan in plans.items()}),
        "pareto": pareto(comparison),
    }
    page = html_report(comparison, plans, pictures, facts, title=title)
    results = comparison.to_dict() | {"facts": dict(facts)}
    contents = {f"{name}.png": png for name, png in pictures.items()}
    contents["report.html"] = page.encode()
    contents["results.json"] = (json.dumps(results, indent=1, allow_nan=False) + "\n").encode()
    for name, data in contents.items():
        write_file(out / name, data)
    return [out / name for name in contents]
