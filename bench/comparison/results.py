"""What was found at equal measured speed: rows, margins, and how it is written down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.comparison.equal_speed import Curve, Reading
from bench.comparison.metrics import bootstrap_interval
from bench.comparison.scenario import Scenario

OURS = "layercache"
REFINED = "layercache-refined"
PUBLISHED = "layercache-published"
_OF_THE_PACKAGE = (OURS, REFINED, PUBLISHED)
MEAN_CACHE = "meancache"
MEASURES = ("psnr", "ssim", "ms_ssim", "lpips")


@dataclass(frozen=True, eq=False)
class ScenarioResult:
    """All that the bench found in one scenario.

    Attributes:
        curves: The measured settings of every method that ran.
        targets: Measured speedups that are compared.
        skipped: Methods that did not run, and why.
        facts: What was run and on what, as label and value.
        uncached_seconds: Median time of one uncached batch.
    """

    scenario: Scenario
    curves: Mapping[str, Curve]
    targets: tuple[float, ...]
    skipped: Mapping[str, str]
    facts: Mapping[str, str]
    uncached_seconds: float

    def at(self, target: float) -> dict[str, Reading]:
        """Every method whose curve reaches a speed, in the order of the tables."""
        readings = {name: curve.at(target) for name, curve in self.curves.items()}
        return {name: reading for name, reading in readings.items() if reading is not None}

    def rows(self) -> list[dict[str, Any]]:
        """One row a target and method."""
        return [
            _row(self.scenario.name, name, reading)
            for target in self.targets
            for name, reading in self.at(target).items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: rows, the settings behind them, margins, what was left out."""
        return {
            "scenario": self.scenario.name,
            "title": self.scenario.title,
            "rows": self.rows(),
            "settings": [
                _setting(name, point)
                for name, curve in self.curves.items()
                for point in curve.points
            ],
            "margins": [margin for target in self.targets for margin in margins(self, target)],
            "skipped": dict(self.skipped),
            "facts": dict(self.facts),
            "uncached_seconds": self.uncached_seconds,
        }


def best_rival(readings: Mapping[str, Reading]) -> str | None:
    """The method of others with the highest mean PSNR."""
    rivals = [name for name in readings if name not in _OF_THE_PACKAGE]
    return max(rivals, key=lambda name: readings[name].mean(), default=None)


def margins(result: ScenarioResult, target: float) -> list[dict[str, Any]]:
    """Differences in mean PSNR at one speed, with a bootstrap interval over paired prompts.

    LayerCache against MeanCache, the best rival and the published LayerCache; its refined plans
    against the best rival; and the published LayerCache against MeanCache. Pairs of which one
    method does not reach the speed are left out.
    """
    readings = result.at(target)
    best = best_rival(readings)
    pairs = dict.fromkeys(
        [
            *((OURS, MEAN_CACHE), (OURS, best), (OURS, PUBLISHED)),
            *((REFINED, best), (PUBLISHED, MEAN_CACHE)),
        ]
    )
    return [
        _margin(target, first, second, readings, best)
        for first, second in pairs
        if first in readings and second in readings and second is not None
    ]


def _margin(
    target: float, first: str, second: str, readings: Mapping[str, Reading], best: str | None
) -> dict[str, Any]:
    a, b = readings[first], readings[second]
    low, high = bootstrap_interval((a.values["psnr"] - b.values["psnr"]).tolist())
    rivals = [name for name in readings if name not in _OF_THE_PACKAGE]
    return {
        "target_speedup": target,
        "method": first,
        "against": second,
        "against_is_best_rival": second == best,
        "psnr_mean": a.mean() - b.mean(),
        "psnr_low": low,
        "psnr_high": high,
        "ssim_mean": a.mean("ssim") - b.mean("ssim"),
        "psnr_worst": a.psnr_worst - b.psnr_worst,
        "psnr_worst_over_best_worst": a.psnr_worst
        - max((readings[name].psnr_worst for name in rivals), default=b.psnr_worst),
    }


def _row(scenario: str, name: str, reading: Reading) -> dict[str, Any]:
    low, high = bootstrap_interval(reading.values["psnr"].tolist())
    peaks = [point.peak_bytes for point in reading.between]
    return {
        "scenario": scenario,
        "method": name,
        "target_speedup": reading.target,
        "compute_share": reading.compute_share,
        # Interpolated to the target: that is what equal speed means here.
        "speedup_measured": reading.target,
        "speedup_predicted": reading.predicted_speedup,
        "psnr_mean": reading.mean(),
        "psnr_low": low,
        "psnr_high": high,
        "psnr_median": reading.psnr_median,
        "psnr_worst": reading.psnr_worst,
        **{
            f"{measure}_mean": reading.mean(measure) if measure in reading.values else None
            for measure in MEASURES[1:]
        },
        "peak_bytes": None if None in peaks else max(p for p in peaks if p is not None),
        "between": [
            {"setting": point.label, "speedup_measured": point.speedup} for point in reading.between
        ],
    }


def _setting(name: str, point: Any) -> dict[str, Any]:
    values = point.values
    return {
        "method": name,
        "setting": point.label,
        "speedup_measured": point.speedup,
        "speedup_predicted": point.predicted_speedup,
        "compute_share": point.compute_share,
        "psnr_mean": point.psnr_mean,
        "psnr_worst": float(values["psnr"].min()),
        "ssim_mean": float(values["ssim"].mean()),
        "psnr": values["psnr"].tolist(),
        "peak_bytes": point.peak_bytes,
    }
