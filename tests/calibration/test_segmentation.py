"""Groups as text, and groups found from curves, against all segmentations of a small model."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercache.calibration._grouping import auto_count, split_groups
from layercache.calibration._segmentation import alike_groups, segments
from layercache.errors import StatsError
from layercache.stats import Group
from tests.test_stats import make_stats


def names(groups: tuple[Group, ...]) -> list[str]:
    return [group.name for group in groups]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2", ["a[0:3]", "b[0:2]"]),
        ("blocks", ["a[0:1]", "a[1:2]", "a[2:3]", "b[0:1]", "b[1:2]"]),
        ("a[0:2], b[1:2]", ["a[0:2]", "b[1:2]"]),
        ("0", []),
    ],
)
def test_groups_are_read_from_text(text: str, expected: list[str]) -> None:
    assert names(split_groups({"a": 3, "b": 2}, text)) == expected


def test_the_name_of_a_single_list_may_be_left_out() -> None:
    assert names(split_groups({"a": 9}, "0:2,2:9")) == ["a[0:2]", "a[2:9]"]


@pytest.mark.parametrize(
    "text",
    [
        *("many", "0:2", "a[0:2", "", "a[2:1]"),
        *("²", "9" * 5000, "0-8,4-12", "a[0:2],a[1:3]"),
    ],
)
def test_text_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(StatsError):
        split_groups({"a": 3, "b": 2}, text)


def test_auto_asks_for_a_number_of_groups() -> None:
    assert [auto_count(g) for g in ("auto", "auto:7", "4", 4, None)] == [4, 7, None, None, None]
    for text in ("auto:few", "auto:0", "auto:-1", "auto:²", "auto:1:2", "auto:" + "9" * 5000):
        with pytest.raises(StatsError, match="write auto:N"):
            auto_count(text)


def cost(curves: Any, weights: Any, bounds: Any) -> float:
    total = 0.0
    for a, b in itertools.pairwise(bounds):
        mean = np.average(curves[a:b], axis=0, weights=weights[a:b])
        total += float((weights[a:b, None] * (curves[a:b] - mean) ** 2).sum())
    return total


@given(st.integers(1, 7), st.integers(0, 10_000))
def test_no_other_segmentation_is_more_homogeneous(blocks: int, seed: int) -> None:
    """Oracle: every way to cut the blocks."""
    rng = np.random.default_rng(seed)
    curves, weights = rng.standard_normal((blocks, 3)), rng.uniform(0.01, 5.0, blocks)
    count = int(rng.integers(1, blocks + 1))
    found = segments({"blocks": blocks}, curves, weights, count)
    bounds = [0, *(group.stop for group in found)]
    assert bounds == [*(group.start for group in found), blocks]
    cuts = itertools.combinations(range(1, blocks), count - 1)
    best = min(cost(curves, weights, [0, *cut, blocks]) for cut in cuts)
    assert cost(curves, weights, bounds) <= best + 1e-9
    # Neither a common level nor the unit of time matters.
    assert names(segments({"blocks": blocks}, curves - 130.0, 1e-3 * weights, count)) == names(
        found
    )


def test_no_group_crosses_from_one_list_into_another() -> None:
    curves, ones = np.array([[0.0], [9.0], [9.0], [0.0]]), np.ones(4)
    assert names(segments({"a": 2, "b": 2}, curves, ones, 3)) == ["a[0:1]", "a[1:2]", "b[0:2]"]
    with pytest.raises(StatsError, match=r"groups=auto:1.*from 2 to 4"):
        segments({"a": 2, "b": 2}, curves, ones, 1)


def test_a_block_counts_by_its_weight() -> None:
    curves = np.array([[0.0], [1.0], [2.2]])
    assert names(segments({"a": 3}, curves, np.ones(3), 2)) == ["a[0:2]", "a[2:3]"]
    # Parting the heavy ones saves 10 / 2; the third is too light to be missed by the second.
    light = np.array([10.0, 10.0, 0.1])
    assert names(segments({"a": 3}, curves, light, 2)) == ["a[0:1]", "a[1:3]"]


def blockwise(sizes: Any, times: Any) -> Any:
    """Statistics with one group a block, whose deltas have these norms and which take these ms."""
    count = len(sizes)
    deltas = np.ones((2, 5, count, 1, 8)) * np.array(sizes)[:, None, None]
    return make_stats(
        groups=tuple(Group(block_list="blocks", start=i, stop=i + 1) for i in range(count)),
        deltas=deltas.astype(np.float32),
        times_ms=np.tile([*times, 1.0, 1.0], (2, 1)),
        group_bytes=(1,) * count,
    )


def test_blocks_that_move_the_velocity_alike_share_a_group() -> None:
    stats = blockwise([10.0, 1.0, 1.0, 1.1, 4.0], np.ones(5))
    assert names(alike_groups(stats, 3)) == ["blocks[0:1]", "blocks[1:4]", "blocks[4:5]"]
    with pytest.raises(StatsError, match="one group a block"):
        alike_groups(make_stats(), 2)


def test_blocks_alike_in_error_but_not_in_time_are_told_apart() -> None:
    """The slow blocks in the middle are worth caching: as much error, eight times the time."""
    stats = blockwise(np.ones(6), [1.0, 1.0, 8.0, 8.0, 1.0, 1.0])
    assert names(alike_groups(stats, 3)) == ["blocks[0:2]", "blocks[2:4]", "blocks[4:6]"]


def test_blocks_alike_in_error_per_millisecond_stay_together() -> None:
    """Twice the block, twice the squared error: there is nothing between the first four."""
    sizes = np.sqrt([1.0, 2.0, 4.0, 3.0, 9.0, 9.0])
    stats = blockwise(sizes, [1.0, 2.0, 4.0, 3.0, 1.0, 1.0])
    assert names(alike_groups(stats, 2)) == ["blocks[0:4]", "blocks[4:6]"]


def test_a_block_too_fast_to_be_timed_does_not_rule() -> None:
    stats = blockwise([1.0, 1.0, 1.0, 9.0, 9.0], [1.0, 0.0, 1.0, 1.0, 1.0])
    assert names(alike_groups(stats, 2)) == ["blocks[0:3]", "blocks[3:5]"]
