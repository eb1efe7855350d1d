"""Exact front of one unit: the least total price for every weight of its computed steps.

Let the unit's computed steps be 0 = r_1 < r_2 < ... < r_n and r_{n+1} = T, with whole weights w.
Its price is a sum of segments S(r_k, r_{k+1} | h_k), where h_k = r_k - r_{k-1} is the gap behind
the anchor r_k and

    S(a, c | h) = sum over t = a+1 .. c-1 of  min(price(t, a, none), price(t, a, a - h)).

So with F_W(a, h) the least price of all segments before a, the weights up to a adding up to W,

    F_{W + w_c}(c, c - a) = min over h of  F_W(a, h) + S(a, c | h)
    front(W) = min over a, h of  F_W(a, h) + S(a, T | h).

Gaps are at most L + 1, since no cell may lie further behind its anchor than L. The work is
O(U W T L^2) for U units, done as O(T L) array operations. Exact for any prices.

Source: shortest paths with a bounded number of edges (Bellman 1958); the gap in the state is this
project's, since a predicted cell depends on two computed steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layercache.solver.problem import BoolArray, FloatArray, IntArray

MOST_PARTS = 12
"""Milliseconds are counted in up to so many parts of the dearest step."""


@dataclass(frozen=True, eq=False)
class Weights:
    """Whole numbers (T,) in place of milliseconds, `part_ms` each.

    `exact` says whether they are the milliseconds; else they are rounded up.
    """

    parts: IntArray
    part_ms: float
    exact: bool


def weigh(compute_ms: FloatArray) -> Weights:
    """Weights of a unit's steps.

    Example:
        >>> weigh(np.array([4.0, 2.0, 0.0, 4.0])).parts
        array([2, 1, 0, 2])
    """
    dearest = float(compute_ms.max())
    if dearest <= 0:
        return Weights(np.zeros(len(compute_ms), dtype=np.int64), 0.0, True)
    for count in range(1, MOST_PARTS + 1):
        shares = compute_ms * (count / dearest)
        whole = np.round(shares)
        if np.abs(shares - whole).max() < 1e-9:
            return Weights(whole.astype(np.int64), dearest / count, True)
    shares = np.ceil(compute_ms * (MOST_PARTS / dearest) - 1e-9)
    return Weights(shares.astype(np.int64), dearest / MOST_PARTS, False)


@dataclass(frozen=True, eq=False)
class Front:
    """The fronts of U units and what is needed to recover their schedules.

    Attributes:
        values: (U, W+1) least price with weight w, at [u, w]; infinite if impossible.
    """

    values: FloatArray
    _weights: IntArray
    _last: tuple[IntArray, IntArray]
    _choices: tuple[NDArray[np.unsignedinteger[Any]], ...]

    def computed(self, unit: int, weight: int) -> BoolArray:
        """(T,) mask of a schedule that attains `values[unit, weight]`."""
        mask: BoolArray = np.zeros(len(self._weights), dtype=bool)
        step, gap = (int(table[unit, weight]) for table in self._last)
        mask[step] = True
        while step > 0:
            before = int(self._choices[step][unit, weight, gap])
            weight -= int(self._weights[step])
            step, gap = step - gap, before
            mask[step] = True
        return mask


def solve_fronts(prices: FloatArray, weights: IntArray) -> Front:
    """Fronts of several units at once.

    Args:
        prices: (U, T, L, J+1), infinite where a cell cannot be cached.
        weights: (T,) whole numbers, not negative.
    """
    units, steps, lags, _ = prices.shape
    gaps = min(lags + 1, steps)
    most = int(weights.sum())
    tables: dict[int, FloatArray] = {}
    segments: dict[int, FloatArray] = {}
    choices = []
    for step in range(steps):
        table = np.full((units, most + 1, gaps + 1), np.inf)
        choice = np.zeros(table.shape, dtype=np.min_scalar_type(gaps))
        weight = int(weights[step])
        if step == 0:
            table[:, weight, 0] = 0.0
        for gap in range(1, min(gaps, step) + 1):
            value, state = _reached(tables[step - gap], segments[step - gap], gap)
            table[:, weight:, gap] = value[:, : most + 1 - weight]
            choice[:, weight:, gap] = state[:, : most + 1 - weight]
        tables[step] = table
        choices.append(choice)
        segments[step] = _segments(prices, step, gaps)
        tables.pop(step - gaps, None)
        segments.pop(step - gaps, None)
    ends = [(steps - gap, *_reached(tables[steps - gap], segments[steps - gap], gap))
            for gap in range(1, gaps + 1)]  # fmt: skip
    values = np.array([value for _, value, _ in ends])
    best = values.argmin(axis=0)
    last = np.array([step for step, _, _ in ends])[best]
    state = np.take_along_axis(np.array([state for *_, state in ends]), best[None], axis=0)[0]
    return Front(values.min(axis=0), weights, (last, state), tuple(choices))


def _reached(table: FloatArray, segment: FloatArray, gap: int) -> tuple[FloatArray, IntArray]:
    """(U, W+1) least price up to `gap` steps after an anchor, and the gap behind it."""
    reached = table + segment[:, gap - 1, None]
    return reached.min(axis=2), reached.argmin(axis=2)


def _segments(prices: FloatArray, anchor: int, gaps: int) -> FloatArray:
    """(U, gaps, gaps+1) price of a segment that ends 1..gaps steps after its anchor, by gap."""
    units, steps, lags, columns = prices.shape
    totals = np.full((units, gaps, gaps + 1), np.inf)
    totals[:, 0] = 0.0
    count = min(gaps - 1, steps - 1 - anchor, lags)
    if count > 0:
        lag = np.arange(count)
        cells = prices[:, anchor + 1 + lag, lag]
        options = np.repeat(cells[:, :, :1], gaps + 1, axis=2)
        near = min(columns - 1, gaps)
        options[:, :, 1 : near + 1] = np.minimum(
            options[:, :, 1 : near + 1], cells[:, :, 1 : near + 1]
        )
        np.cumsum(options, axis=1, out=totals[:, 1 : count + 1])
    return totals
