"""How good plans are, by how they were calibrated; on the reference model.

    python -m bench.calibration_plans [--json] [--quick] [--only modes groups prompts]
        [--parts FOLDER] [--picture docs/images/calibration-prompts.png]

- `modes`: replay mode against residual mode, without perturbed runs as it is by default and with
  those of replay mode, by what may be cached and share of compute. Validation prompts.
- `groups`: four groups of equal size against four of `auto`, likewise.
- `prompts`: plans from 1, 2, 4, ... calibration prompts on *held-out* prompts, reported and never
  chosen by; drawn as a picture. For fewer than all prompts several disjoint sets are taken.

Quality is the mean over prompts of the PSNR in dB to the uncached image.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from layercache import Budget, CalibrationStats, compile_plan
from layercache._write import write_file
from layercache.calibration import calibrate
from layercache.calibration.prompts import Batch, batches, prompt_id
from layercache.evaluation.metrics import fidelity
from layercache.models.pipelines import run_pipeline
from layercache.reference import call_arguments, load_pipeline, prompts
from layercache.runtime import apply_plan

SHARES = (0.73, 0.5, 0.33)
UNITS = (("groups",), ("step", "groups"))
COUNTS = (1, 2, 4, 8, 16, 32)
SETS = 2
BATCH = 8


class Bench:
    """The pipeline and what is measured on it, at one length."""

    def __init__(self, steps: int, parts: Path, progress: bool) -> None:
        self.pipe = load_pipeline()
        self.steps, self.parts, self.progress = steps, parts, progress
        self.setting = call_arguments()
        del self.setting["generator"], self.setting["num_inference_steps"]

    def stats(self, name: str, count: int, **options: Any) -> CalibrationStats:
        """Statistics of the first calibration prompts, kept in a folder of that name."""
        found: CalibrationStats = calibrate(
            self.pipe,
            prompts("calibration", count),
            num_inference_steps=self.steps,
            batch_size=BATCH,
            call_kwargs=self.setting,
            parts=self.parts / name,
            progress=self.progress,
            **options,
        )
        return found

    def work(self, split: Any, count: int, seed: int) -> list[Batch]:
        call = self.setting | {"num_inference_steps": self.steps}
        return batches(prompts(split, count), seed, BATCH, call)

    def references(self, work: Sequence[Batch]) -> list[torch.Tensor]:
        """Uncached images."""
        with torch.no_grad():
            return [run_pipeline(self.pipe, batch.arguments) for batch in work]

    def psnr(
        self,
        stats: CalibrationStats,
        share: float,
        units: Sequence[str],
        work: Sequence[Batch],
        references: Sequence[torch.Tensor],
    ) -> float:
        """Mean PSNR of the plan of these statistics."""
        plan = compile_plan(stats, Budget(fraction=share), units=units)
        values: list[float] = []
        with torch.no_grad(), apply_plan(self.pipe, plan):
            for batch, reference in zip(work, references, strict=True):
                values += fidelity(run_pipeline(self.pipe, batch.arguments), reference).psnr_db
        return sum(values) / len(values)


def table(
    bench: Bench, rivals: dict[str, CalibrationStats], validation: int
) -> dict[str, dict[str, float]]:
    """PSNR of each rival's plans, by units and share."""
    work = bench.work("validation", validation, 1)
    references = bench.references(work)
    found: dict[str, dict[str, float]] = {name: {} for name in rivals}
    cells = [(units, share, name) for units in UNITS for share in SHARES for name in rivals]
    for units, share, name in tqdm(cells, desc="plans", disable=not bench.progress):
        label = f"{'+'.join(units)} {share:g}"
        found[name][label] = bench.psnr(rivals[name], share, units, work, references)
    return found


def modes(bench: Bench, count: int, validation: int) -> dict[str, dict[str, float]]:
    """Replay against residual mode."""
    replay = bench.stats("replay", count)
    residual = bench.stats("residual", count, mode="residual")
    # The same perturbed runs as replay mode's, since prompts and noise are the same.
    informed = dataclasses.replace(residual, amplification=replay.amplification)
    rivals = {"replay": replay, "residual": residual, "residual, probes": informed}
    return table(bench, rivals, validation)


def groups(bench: Bench, count: int, validation: int) -> dict[str, dict[str, float]]:
    """Equal against `auto` groups."""
    equal, auto = bench.stats("replay", count), bench.stats("auto", count, groups="auto")
    names = ", ".join(group.name for group in auto.groups)
    return table(bench, {"equal": equal, f"auto ({names})": auto}, validation)


def by_count(bench: Bench, counts: Sequence[int], held_out: int) -> dict[str, Any]:
    """PSNR on held-out prompts by share, number of calibration prompts and set of them."""
    everything = bench.stats("replay", max(counts))
    # In the order in which the prompts are listed, not in that of their digests.
    order = [
        everything.prompt_ids.index(prompt_id(text, 0))
        for text in prompts("calibration", max(counts))
    ]
    work = bench.work("held-out", held_out, 2)
    references = bench.references(work)
    jobs = [
        (share, count, first)
        for share in SHARES
        for count in counts
        for first in range(0, min(SETS * count, max(counts) - count + 1), count)
    ]
    found: dict[str, dict[str, list[float]]] = {}
    for share, count, first in tqdm(jobs, desc="plans", disable=not bench.progress):
        chosen = everything.select(order[first : first + count])
        value = bench.psnr(chosen, share, ("step", "groups"), work, references)
        found.setdefault(f"{share:g}", {}).setdefault(str(count), []).append(value)
    return {"held_out_prompts": held_out, "psnr_db": found}


def picture(found: dict[str, Any]) -> bytes:
    """PSNR against the number of calibration prompts, a line a share of compute."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    axis = figure.subplots()
    colours = ("#c2410c", "#1d4ed8", "#15803d", "#64748b")
    counts: list[int] = []
    for colour, (share, values) in zip(colours, found["psnr_db"].items(), strict=False):
        counts = [int(count) for count in values]
        means = [sum(v) / len(v) for v in values.values()]
        axis.plot(counts, means, color=colour, marker="o", ms=5)
        for count, several in zip(counts, values.values(), strict=True):
            axis.scatter([count] * len(several), several, color=colour, s=14, alpha=0.45, zorder=2)
        label = f"{100 * float(share):.0f} % of\nthe compute"
        axis.annotate(
            label, (counts[-1], means[-1]), (10, 0), textcoords="offset points", color=colour,
            va="center", fontsize=9,
        )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_xlim(counts[0] / 1.2, counts[-1] * 2.1)
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.set_xlabel("calibration prompts")
    axis.set_ylabel("PSNR to the uncached image, dB")
    axis.set_title(
        f"Mean of {found['held_out_prompts']} held-out prompts; each dot one set of calibration "
        "prompts, lines their mean",
        loc="left",
        fontsize=9,
    )
    axis.grid(color="#e2e8f0", lw=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format="png")
    return buffer.getvalue()


def report(figures: dict[str, Any]) -> str:
    """The figures as tables for a person."""
    lines = []
    for name in ("modes", "groups"):
        for rival, values in figures.get(name, {}).items():
            cells = "   ".join(f"{label}: {value:.1f}" for label, value in values.items())
            lines.append(f"{name:<8}{rival:<20} {cells}")
    for share, values in figures.get("prompts", {}).get("psnr_db", {}).items():
        cells = "   ".join(
            f"{count}: {sum(several) / len(several):.1f} ({min(several):.1f}-{max(several):.1f})"
            for count, several in values.items()
        )
        lines.append(f"prompts {share:<20} {cells}")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="small runs, for a smoke test")
    parts = ("modes", "groups", "prompts")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--parts", type=Path, help="folder that keeps the statistics")
    parser.add_argument("--picture", type=Path, help="PNG to write")
    chosen = parser.parse_args()
    steps, count, held_out = 50, 8, chosen.held_out
    counts: tuple[int, ...] = COUNTS
    if chosen.quick:
        steps, count, counts, held_out = 6, 1, (1,), 1
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(steps, chosen.parts or Path(folder), progress=not chosen.json)
        if "modes" in chosen.only:
            figures["modes"] = modes(bench, count, count)
        if "groups" in chosen.only:
            figures["groups"] = groups(bench, count, count)
        if "prompts" in chosen.only:
            figures["prompts"] = by_count(bench, counts, held_out)
            if chosen.picture is not None:
                write_file(chosen.picture, picture(figures["prompts"]))
    print(json.dumps(figures) if chosen.json else report(figures))


if __name__ == "__main__":
    main()
