"""What was found, as text: aligned for a terminal, and `RESULTS.md`."""

from __future__ import annotations

from collections.abc import Sequence

from bench.comparison.goals import goal_lines
from bench.comparison.metrics import bootstrap_interval
from bench.comparison.results import ScenarioResult, margins


def table(result: ScenarioResult) -> str:
    """The rows as aligned text, by target."""
    lines = [
        f"{'speed':>6}  {'method':<22}{'PSNR':>9}{'95 % interval':>16}{'worst':>8}{'SSIM':>9}"
        f"{'compute':>10}"
    ]
    for target in result.targets:
        lines.append("")
        readings = result.at(target)
        for name in sorted(readings, key=lambda name: -readings[name].mean()):
            reading = readings[name]
            low, high = bootstrap_interval(reading.values["psnr"].tolist())
            lines.append(
                f"{f'{target:g}x':>6}  {name:<22}{reading.mean():>6.1f} dB"
                f"{f'{low:.1f} to {high:.1f}':>16}{reading.psnr_worst:>8.1f}"
                f"{reading.mean('ssim'):>9.4f}{100 * reading.compute_share:>8.1f} %"
            )
    return "\n".join(lines)


def markdown(results: Sequence[ScenarioResult], command: str) -> str:
    """`RESULTS.md`: one table a scenario, the margins, and what did not run."""
    parts = [
        "# Every method at equal measured speed",
        f"Written by `{command}`; [the protocol](../README.md) says how. PSNR in dB to "
        "the uncached image of the same seed: mean over held-out prompts, median and worst prompt "
        "in parentheses, then SSIM. Every method is read at the *measured* speedup in the column's "
        "head, between two of its own settings; a dash says that none of its settings is that slow "
        "or that fast. Figures of the small reference model; they say nothing about others.",
    ]
    for result in results:
        parts += [f"## {result.scenario.title}", _scores(result), goal_lines(result)]
        parts += ["Margins, paired by prompt:", _margin_lines(result)]
        if result.skipped:
            parts.append(
                "Not run:\n\n"
                + "\n".join(f"- `{name}`: {why}" for name, why in result.skipped.items())
            )
        parts.append("\n".join(f"- {label}: {value}" for label, value in result.facts.items()))
    return "\n\n".join(parts) + "\n"


def _scores(result: ScenarioResult) -> str:
    readings = {target: result.at(target) for target in result.targets}
    head = "| method | " + " | ".join(f"{target:g}x" for target in result.targets) + " |"
    lines = [head, "|---" * (1 + len(result.targets)) + "|"]
    best = {
        target: max((r.mean() for r in at.values()), default=0) for target, at in readings.items()
    }
    for name in result.curves:
        cells = []
        for target in result.targets:
            reading = readings[target].get(name)
            if reading is None:
                cells.append("-")
                continue
            mean = f"{reading.mean():.1f}"
            mean = f"**{mean}**" if reading.mean() == best[target] else mean
            cells.append(
                f"{mean} ({reading.psnr_median:.1f}, {reading.psnr_worst:.1f}) "
                f"{reading.mean('ssim'):.4f}"
            )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _margin_lines(result: ScenarioResult) -> str:
    lines = [
        "| at | | mean PSNR, dB | 95 % interval | worst prompt, dB | SSIM |",
        "|---|---|---|---|---|---|",
    ]
    for target in result.targets:
        for margin in margins(result, target):
            against = margin["against"]
            if margin["against_is_best_rival"]:
                against += " (best rival)"
            lines.append(
                f"| {target:g}x | {margin['method']} over {against} | {margin['psnr_mean']:+.1f} | "
                f"{margin['psnr_low']:+.1f} to {margin['psnr_high']:+.1f} | "
                f"{margin['psnr_worst']:+.1f} | {margin['ssim_mean']:+.4f} |"
            )
    return "\n".join(lines)
