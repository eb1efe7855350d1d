"""What this project set out to reach at equal measured speed, and whether it did."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bench.comparison.results import (
    MEAN_CACHE,
    OURS,
    PUBLISHED,
    ScenarioResult,
    best_rival,
)

RIVALS_AT = (1.37, 2.0, 3.0, 4.0)
PUBLISHED_AT = (1.37, 1.71)
OVER_MEAN_CACHE_DB = 10.0
OVER_PUBLISHED_DB = 5.0


@dataclass(frozen=True)
class Goal:
    """One goal at one speed.

    Attributes:
        what: In words.
        target_speedup: Measured.
        figure: The difference that was measured, in dB or SSIM; None where a method that it needs
            does not reach the speed.
        least: What it must be at least.
    """

    what: str
    target_speedup: float
    figure: float | None
    least: float

    @property
    def met(self) -> bool:
        """Whether the figure was measured and is high enough."""
        return self.figure is not None and self.figure >= self.least

    @property
    def text(self) -> str:
        """The figure in words."""
        digits = 4 if "SSIM" in self.what else 1
        return "not reached" if self.figure is None else f"{self.figure:+.{digits}f}"


def goals(result: ScenarioResult) -> list[Goal]:
    """Every goal at those of its speeds that were compared."""
    return list(_goals(result))


def _goals(result: ScenarioResult) -> Iterator[Goal]:
    for target in result.targets:
        readings = result.at(target)
        ours = readings.get(OURS)
        if target in RIVALS_AT:
            mean_cache, best = readings.get(MEAN_CACHE), best_rival(readings)
            rival = readings[best] if best is not None else None
            others = [
                reading for name, reading in readings.items() if name not in (OURS, PUBLISHED)
            ]
            above = ours.mean() - mean_cache.mean() if ours and mean_cache else None
            yield Goal("mean PSNR over MeanCache", target, above, OVER_MEAN_CACHE_DB)
            above = ours.mean() - rival.mean() if ours and rival else None
            yield Goal(f"mean PSNR over the best rival ({best})", target, above, 0.0)
            above = ours.psnr_worst - rival.psnr_worst if ours and rival else None
            yield Goal(f"worst prompt over the best rival's ({best})", target, above, 0.0)
            above = None
            if ours and others:
                above = ours.mean("ssim") - max(other.mean("ssim") for other in others)
            yield Goal("SSIM over the highest of any rival", target, above, 0.0)
        if target in PUBLISHED_AT:
            published = readings.get(PUBLISHED)
            above = ours.mean() - published.mean() if ours and published else None
            yield Goal("mean PSNR over the published LayerCache", target, above, OVER_PUBLISHED_DB)


def goal_lines(result: ScenarioResult) -> str:
    """The goals as a Markdown table."""
    lines = ["| goal | at | at least | measured | met |", "|---|---|---|---|---|"]
    for goal in goals(result):
        lines.append(
            f"| {goal.what} | {goal.target_speedup:g}x | {goal.least:g} | {goal.text} | "
            f"{'yes' if goal.met else 'no'} |"
        )
    return "\n".join(lines)
