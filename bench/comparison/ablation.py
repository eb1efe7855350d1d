"""What each part of LayerCache is worth: every row changes one thing of the default.

Rows are compiled for the same shares of compute and run on validation prompts: they serve to
understand the design, and choosing by them touches no held-out prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.comparison.entrants import Entrant
from bench.comparison.field import plans
from bench.comparison.inputs import GROUPS, PUBLISHED_GROUPS, Inputs
from bench.comparison.scenario import BenchSize, Scenario
from bench.comparison.store import Store, fingerprint
from bench.comparison.tuning import Validation
from layercache._write import write_file
from layercache.evaluation._contenders import PUBLISHED
from layercache.evaluation.methods import LayerCache
from layercache.options import Options
from layercache.stats import CalibrationStats

SHARES = (0.73, 0.5, 0.33)
VALIDATION = 16

Statistics = Callable[[], CalibrationStats]


@dataclass(frozen=True)
class Variant:
    """One row: what it changes, to what, and how plans are then compiled."""

    axis: str
    value: str
    options: Options
    stats: Statistics


@dataclass(frozen=True)
class AblationRow:
    """Mean and worst PSNR in dB at each share of compute; None where no plan fits the budget."""

    axis: str
    value: str
    psnr_mean: tuple[float | None, ...]
    psnr_worst: tuple[float | None, ...]


@dataclass(frozen=True)
class Ablation:
    """The table."""

    title: str
    shares: tuple[float, ...]
    prompts: int
    rows: tuple[AblationRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def text(self) -> str:
        """Aligned text."""
        lines = [f"{'':<44}" + "".join(f"{f'share {share:g}':>18}" for share in self.shares)]
        for row in self.rows:
            cells = (
                f"{'-' if mean is None else f'{mean:.1f} ({worst:.1f})':>18}"
                for mean, worst in zip(row.psnr_mean, row.psnr_worst, strict=True)
            )
            lines.append(f"{f'{row.axis}: {row.value}':<44}" + "".join(cells))
        return "\n".join(lines)

    def markdown(self) -> str:
        """`ABLATION.md`."""
        lines = [
            "# Ablation",
            "",
            f"Written by `python -m bench --ablation`: {self.title}, {self.prompts} validation "
            "prompts, mean PSNR in dB to the uncached image (worst prompt in parentheses) at equal "
            "share of transformer compute. Each row changes one thing of the default, the first.",
            "",
            "| | | " + " | ".join(f"{share:g}" for share in self.shares) + " |",
            "|---" * (2 + len(self.shares)) + "|",
        ]
        for row in self.rows:
            cells = (
                "-" if mean is None else f"{mean:.1f} ({worst:.1f})"
                for mean, worst in zip(row.psnr_mean, row.psnr_worst, strict=True)
            )
            lines.append(f"| {row.axis} | {row.value} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"


def run_ablation(
    out: Path,
    scenario: Scenario,
    size: BenchSize,
    *,
    weights: Path | None = None,
    results: Path | None = None,
    axes: tuple[str, ...] | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> Ablation:
    """Run every variant, or go on where an earlier run stopped, and write the table.

    Args:
        out: Folder in which statistics and trials are kept; the bench uses the same ones.
        scenario: How the model is used.
        size: Calibration prompts and lags are taken from it, and twice its validation prompts.
        weights: Folder of other weights of the reference model.
        results: Folder for `ABLATION.md` and `ablation.json`; None is `out`.
        axes: Only these; None is all.
        log: Receives a line at the start of every row.
    """
    size = replace(size, validation=min(VALIDATION, 2 * size.validation))
    pipe = scenario.load(weights)
    store = Store(out / scenario.name, fingerprint(scenario, pipe))
    inputs = Inputs(pipe, scenario, size, store, log)
    validation = Validation(inputs)
    rows = []
    for variant in variants(inputs):
        if axes is None or variant.axis in (*axes, "default"):
            log(f"{variant.axis}: {variant.value}")
            rows.append(_row(variant, validation))
    table = Ablation(scenario.title, SHARES, size.validation, tuple(rows))
    folder = results or out
    write_file(folder / "ABLATION.md", table.markdown().encode())
    text = json.dumps(table.to_dict(), indent=1, allow_nan=False) + "\n"
    write_file(folder / "ablation.json", text.encode())
    return table


def variants(inputs: Inputs) -> Iterator[Variant]:
    """All rows, the default first."""
    default = Options()

    def row(axis: str, value: str, stats: Statistics = inputs.stats, **changes: Any) -> Variant:
        return Variant(axis, value, replace(default, **changes), stats)

    yield row("default", "as `compile_plan` gives it")
    yield row("units", "groups only", units=("groups",))
    yield row("units", "step unit only", units=("step",))
    yield row("prediction", "reuse", predictor="reuse")
    yield row("prediction", "published (JVP)", predictor="published")
    yield row("solver", "dp", solver="dp")
    yield row("solver", "greedy", solver="greedy")
    yield row("solver", "greedy, groups only", solver="greedy", units=("groups",))
    yield Variant("solver", "published: greedy, groups, JVP", PUBLISHED, inputs.stats)
    yield row("error", "velocity delta without propagation", lambda: unweighted(inputs.stats()))
    yield row(
        "error",
        "feature error, groups only",
        partial(inputs.stats, mode="residual"),
        units=("groups",),
    )
    for groups in (1, PUBLISHED_GROUPS, 8):
        yield row("groups", f"{groups}", partial(inputs.stats, groups=groups))
        yield row(
            "groups",
            f"{groups}, groups only",
            partial(inputs.stats, groups=groups),
            units=("groups",),
        )
    few = min(4, inputs.size.calibration)
    for many in (GROUPS, None):
        name = "one a block" if many is None else str(many)
        yield row(
            "groups",
            f"{name}, groups only, {few} calibration prompts",
            partial(inputs.stats, groups=many, count=few),
            units=("groups",),
        )
    count = 1
    while count < inputs.size.calibration:
        yield row("calibration prompts", f"{count}", partial(first_prompts, inputs, count))
        count *= 2


def unweighted(stats: CalibrationStats) -> CalibrationStats:
    """The statistics with every step's errors counted alike, however they grow."""
    return replace(stats, amplification=np.ones_like(stats.amplification))


def first_prompts(inputs: Inputs, count: int) -> CalibrationStats:
    """The statistics of the first `count` calibration prompts alone."""
    return subset(inputs.stats(), inputs.calibration.ids[:count])


def subset(stats: CalibrationStats, ids: tuple[str, ...]) -> CalibrationStats:
    """The statistics of some prompts alone."""
    chosen = [index for index, identity in enumerate(stats.prompt_ids) if identity in ids]
    return stats.select(chosen)


def _row(variant: Variant, validation: Validation) -> AblationRow:
    stats = variant.stats()
    counts = {share: round(share * stats.num_steps) for share in SHARES}
    found = plans(stats, tuple(counts.values()), variant.options)
    means: list[float | None] = []
    worst: list[float | None] = []
    for share in SHARES:
        plan = found.get(counts[share])
        if plan is None:
            means.append(None)
            worst.append(None)
            continue
        entrant = Entrant("ablation", f"{variant.axis} {variant.value}", LayerCache(plan))
        trial = validation.trial(entrant)
        means.append(trial.psnr_mean)
        worst.append(min(trial.psnr_db))
    return AblationRow(variant.axis, variant.value, tuple(means), tuple(worst))
