"""Curves read at a speed, against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.comparison.equal_speed import Curve, Point, pareto_front, read_at
from bench.comparison.metrics import bootstrap_interval


def point(speedup: float, *psnr: float, share: float | None = None) -> Point:
    return Point(
        label=f"{speedup}x",
        speedup=speedup,
        compute_share=share or 1 / speedup,
        values={"psnr": np.array(psnr), "ssim": np.array(psnr) / 100},
    )


def test_a_reading_is_linear_in_the_logarithm_of_the_speed() -> None:
    reading = read_at([point(2.0, 60.0), point(2.88, 40.0)], 2.4)
    assert reading is not None
    assert reading.weight == pytest.approx(0.5)
    assert reading.mean() == pytest.approx(50.0)
    assert reading.mean("ssim") == pytest.approx(0.5)
    assert reading.compute_share == pytest.approx((1 / 2 + 1 / 2.88) / 2)


def test_a_reading_at_a_setting_is_that_setting() -> None:
    reading = read_at([point(1.5, 60.0, 50.0), point(2.0, 44.0, 42.0)], 2.0)
    assert reading is not None
    assert reading.values["psnr"].tolist() == [44.0, 42.0]
    assert reading.between[0] is reading.between[1]


def test_nothing_is_extrapolated() -> None:
    points = [point(1.5, 60.0), point(2.0, 40.0)]
    assert read_at(points, 1.49) is None
    assert read_at(points, 2.01) is None
    assert read_at([], 2.0) is None


def test_no_line_is_drawn_over_a_long_stretch() -> None:
    points = [point(1.0, 120.0), point(1.6, 40.0)]
    assert read_at(points, 1.3) is None


def test_the_worst_prompt_is_that_of_the_interpolated_values() -> None:
    # The two settings have different worst prompts: neither's worst is the reading's.
    reading = read_at([point(2.0, 30.0, 60.0), point(2.88, 50.0, 20.0)], 2.4)
    assert reading is not None
    assert reading.psnr_worst == pytest.approx(40.0)
    assert reading.psnr_median == pytest.approx(40.0)


def test_a_setting_that_another_one_beats_does_not_count() -> None:
    good, bad, fast = point(2.0, 50.0), point(1.8, 45.0), point(2.5, 40.0)
    assert pareto_front([bad, fast, good]) == [good, fast]
    # The dominated setting is no neighbour; nobody would run it, having the good one.
    reading = read_at([bad, good, fast], 1.9)
    assert reading is not None and reading.between == (good, good)
    assert reading.values["psnr"].tolist() == good.values["psnr"].tolist()
    assert read_at([good, fast], 1.9) is None, "nothing was measured that slow"
    assert Curve("m", (bad, good, fast)).at(2.0).values["psnr"] == [50.0]  # type: ignore[union-attr]


@given(
    st.lists(
        st.tuples(st.floats(1.0, 8.0), st.floats(10.0, 90.0)), min_size=1, max_size=12, unique=True
    )
)
def test_a_front_falls_and_holds_every_setting_below_or_on_it(
    pairs: list[tuple[float, float]],
) -> None:
    points = [point(speed, value) for speed, value in pairs]
    front = pareto_front(points)
    speeds, values = [p.speedup for p in front], [p.psnr_mean for p in front]
    assert speeds == sorted(speeds) and values == sorted(values, reverse=True)
    assert all(
        any(f.speedup >= p.speedup and f.psnr_mean >= p.psnr_mean for f in front) for p in points
    )


@given(st.floats(1.01, 1.5), st.floats(0.0, 1.0))
def test_a_reading_lies_between_its_neighbours(ratio: float, part: float) -> None:
    target = 2.0 * ratio**part
    reading = read_at([point(2.0, 60.0), point(2.0 * ratio, 40.0)], target)
    if reading is not None:  # rounding may put the target just outside
        assert 40.0 <= reading.mean() <= 60.0
        assert reading.mean() == pytest.approx(
            60 - 20 * math.log(target / 2.0) / math.log(ratio), abs=1e-6
        )


def test_the_bootstrap_interval_holds_the_mean_and_narrows_with_more_prompts() -> None:
    rng = np.random.default_rng(0)
    few, many = rng.normal(50, 5, 8).tolist(), rng.normal(50, 5, 800).tolist()
    for values in (few, many):
        low, high = bootstrap_interval(values)
        assert low < float(np.mean(values)) < high
    narrow, wide = (high - low for low, high in map(bootstrap_interval, (many, few)))
    # The standard error of 800 values is a tenth of that of 8.
    assert narrow < wide / 5
    assert narrow == pytest.approx(2 * 1.96 * 5 / math.sqrt(800), rel=0.15)
