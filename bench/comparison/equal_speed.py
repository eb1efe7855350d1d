"""Curves of quality over measured speed, and what they are at a speed that all methods share.

Shape suffixes: N prompts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

WIDEST = 1.5
"""Neighbouring settings further apart in speed than this factor are not read between."""


@dataclass(frozen=True, eq=False)
class Point:
    """One setting of a method, measured.

    Attributes:
        label: The setting, in words.
        speedup: Median over batches and rounds of uncached time over the method's time.
        compute_share: Of the transformer's full compute.
        values: (N,) per prompt and measure; "psnr" is always there.
        predicted_speedup: What was promised, where something was.
        peak_bytes: Largest peak memory of its runs.
    """

    label: str
    speedup: float
    compute_share: float
    values: Mapping[str, Array]
    predicted_speedup: float | None = None
    peak_bytes: int | None = None

    @property
    def psnr_mean(self) -> float:
        """Mean PSNR in dB."""
        return float(self.values["psnr"].mean())


@dataclass(frozen=True, eq=False)
class Reading:
    """A curve at a speed: an interpolation between two neighbouring settings.

    Attributes:
        target: The measured speedup.
        values: (N,) per prompt and measure.
        compute_share: Interpolated as well.
        predicted_speedup: Interpolated as well, where both neighbours have one.
        between: The two settings; twice the same where one has this very speed.
        weight: Of the second.
    """

    target: float
    values: Mapping[str, Array]
    compute_share: float
    predicted_speedup: float | None
    between: tuple[Point, Point]
    weight: float

    def mean(self, measure: str = "psnr") -> float:
        """Mean over prompts."""
        return float(self.values[measure].mean())

    @property
    def psnr_worst(self) -> float:
        """The lowest PSNR of any prompt."""
        return float(self.values["psnr"].min())

    @property
    def psnr_median(self) -> float:
        """Median PSNR over prompts."""
        return float(statistics.median(self.values["psnr"].tolist()))


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Settings that no other one beats in both speed and mean PSNR, the slowest first.

    Every method is read along its front, so none is held to a setting that nobody would choose.
    """
    ordered = sorted(points, key=lambda point: (-point.speedup, -point.psnr_mean))
    front: list[Point] = []
    for point in ordered:
        if not front or point.psnr_mean > front[-1].psnr_mean:
            front.append(point)
    return front[::-1]


def read_at(points: Sequence[Point], target: float) -> Reading | None:
    """The curve at a measured speedup, or None where it does not reach.

    Between the neighbouring settings s_a <= s <= s_b of the Pareto front every prompt's value is
    linear in log(speedup):

        value(s) = (1 - w) value_a + w value_b,   w = log(s / s_a) / log(s_b / s_a).

    For PSNR this says that the error is a power of the speed. There is no extrapolation, and no
    reading where the neighbours are more than a factor of `WIDEST` apart: curves bend, and a line
    over a long stretch would flatter. Where all settings that slow are worse than a faster one,
    that one is what anybody would run, and it is read as it is.

    Example:
        >>> slow = Point("slow", 1.0, 1.0, {"psnr": np.array([60.0])})
        >>> fast = Point("fast", 1.44, 0.7, {"psnr": np.array([40.0])})
        >>> round(read_at([slow, fast], 1.2).mean(), 6)
        50.0
        >>> read_at([slow, fast], 1.5) is None
        True
    """
    front = pareto_front(points)
    before = [point for point in front if point.speedup <= target]
    after = [point for point in front if point.speedup >= target]
    if not after or all(point.speedup > target for point in points):
        return None
    a, b = before[-1] if before else after[0], after[0]
    if b.speedup > WIDEST * (a.speedup if before else target):
        return None
    weight = 0.0 if a is b else math.log(target / a.speedup) / math.log(b.speedup / a.speedup)
    promised = None
    if a.predicted_speedup is not None and b.predicted_speedup is not None:
        promised = _between(a.predicted_speedup, b.predicted_speedup, weight)
    return Reading(
        target=target,
        values={
            name: (1 - weight) * a.values[name] + weight * b.values[name]
            for name in a.values
            if name in b.values
        },
        compute_share=_between(a.compute_share, b.compute_share, weight),
        predicted_speedup=promised,
        between=(a, b),
        weight=weight,
    )


def _between(a: float, b: float, weight: float) -> float:
    return (1 - weight) * a + weight * b


@dataclass(frozen=True, eq=False)
class Curve:
    """All measured settings of one method."""

    method: str
    points: tuple[Point, ...]
    note: str = field(default="")

    def at(self, target: float) -> Reading | None:
        """`read_at` of its settings."""
        return read_at(self.points, target)
