"""Cached groups. Oracle: residuals whose prediction is exact, and deltas put together by hand."""

from __future__ import annotations

import numpy as np
import pytest

from layercache.prediction._cells import GroupCells
from tests.prediction.oracle import polynomial_stats
from tests.prediction.strategies import random_stats


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize(
    ("degree", "predictor", "sources"),
    [(0, "reuse", (6,)), (1, "published", (6, 4)), (1, "fitted", (6, 3)), (2, "fitted", (6, 5, 3))],
)
def test_a_polynomial_is_predicted_from_as_many_values_as_it_takes(
    degree: int, predictor: str, sources: tuple[int, ...], quick: bool
) -> None:
    stats = polynomial_stats(degree, lags=6)
    cells = GroupCells(stats, stats.deltas, predictor, quick)
    cell = cells.cell(8, 1, sources)
    reuse = np.linalg.norm(stats.deltas[:, 8, 1, 1], axis=1)
    assert (cell.size <= (0.1 if quick else 1e-3) * reuse + 1e-6).all()


def test_one_value_less_is_not_enough() -> None:
    stats = polynomial_stats(2, lags=6)
    cells = GroupCells(stats, stats.deltas, "fitted", False)
    assert cells.cell(8, 1, (6, 5)).size.mean() > 10 * cells.cell(8, 1, (6, 5, 3)).size.mean()


def test_the_delta_is_that_of_the_taps() -> None:
    """Oracle: D of the anchor, and its differences to the other lags, added up."""
    stats = random_stats(1, lags=6)
    cell = GroupCells(stats, stats.deltas, "fitted", False).cell(9, 0, (7, 6, 4))
    measured = stats.deltas[:, 9, 0].astype(float)
    anchor, one, two = measured[:, 1], measured[:, 2], measured[:, 4]
    expected = anchor + cell.taps[0] * (anchor - one) + cell.taps[1] * (anchor - two)
    assert cell.delta == pytest.approx(expected)
    assert cell.size == pytest.approx(np.linalg.norm(expected, axis=1))
    assert not cell.published


def test_the_published_predictor_is_the_line_through_two_values_or_reuse() -> None:
    stats = random_stats(2, lags=6)
    sigma = stats.sigmas.astype(float)
    line = polynomial_stats(1, lags=6)
    cell = GroupCells(line, line.deltas, "published", False).cell(9, 0, (7, 4))
    assert cell.taps == pytest.approx([(sigma[9] - sigma[7]) / (sigma[7] - sigma[4])])
    flat = polynomial_stats(0, lags=6)
    assert GroupCells(flat, flat.deltas, "published", False).cell(9, 0, (7, 4)).published


def test_what_may_be_read_was_computed_and_measured() -> None:
    stats = random_stats(3, lags=4)
    cells = GroupCells(stats, stats.deltas, "fitted", False)
    assert cells.sources(9, [0, 2, 5, 6, 8], 4) == (8, 6, 5)
    assert cells.sources(9, [0, 2, 5, 6, 8], 1) == (8, 6)
    assert cells.sources(9, [0, 2, 5, 6, 8], 0) == (8,)
    assert GroupCells(stats, stats.deltas, "published", False).sources(9, [5, 6, 8], 4) == (8, 6)
