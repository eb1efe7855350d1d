"""Exact front of one unit: the least total price for every number of refreshes.

Let the unit's refreshes be 0 = r_1 < r_2 < ... < r_n and r_{n+1} = T. Its price is a sum of
segments S(r_k, r_{k+1} | h_k), where h_k = (r_k - r_{k-1}, ..., r_{k-H+1} - r_{k-H}) are the H gaps
behind the anchor r_k and

    S(a, c | h) = sum over t = a+1 .. c-1 of  min over allowed spans j of  price(t, a, a - j),
    j in {0, h_1, h_1 + h_2, ...}.

So with F_n(a, h) the least price of all segments before a, given n refreshes of which a is the
last,

    F_{n+1}(c, (c-a, h_1, .., h_{H-1})) = min over h_H of  F_n(a, h) + S(a, c | h)
    front(n) = min over a, h of  F_n(a, h) + S(a, T | h).

Gaps are at most L + 1, since no cell may lie further behind its anchor than L. The work is
O(U N T (L+1)^(H+1)) for U units and N <= T refreshes, done as O(T L) array operations.

Source: shortest paths with a bounded number of edges (Bellman 1958); the state with H gaps is this
project's, since a predicted cell depends on two refreshes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layercache.solver.problem import BoolArray, FloatArray

_MAX_CELLS = 8_000_000


@dataclass(frozen=True, eq=False)
class Front:
    """The fronts of U units and what is needed to recover their schedules.

    Attributes:
        values: (U, T+1) least price with exactly n refreshes, at [u, n]; infinite if impossible.
    """

    values: FloatArray
    _last: NDArray[np.integer[Any]]
    _back: tuple[tuple[NDArray[np.unsignedinteger[Any]], ...], ...]
    _chunk: int
    _gaps: int
    _history: int

    def refreshes(self, unit: int, count: int) -> BoolArray:
        """(T,) mask of a schedule that attains `values[unit, count]`."""
        steps = self.values.shape[1] - 1
        base = self._gaps + 1
        top = base ** max(self._history - 1, 0)
        step, state = divmod(int(self._last[unit, count]), base**self._history)
        back, row = self._back[unit // self._chunk], unit % self._chunk
        refresh = np.zeros(steps, dtype=bool)
        refresh[step] = True
        while step > 0:
            choice = int(back[step][row, count, state])
            if self._history == 0:
                step -= choice
            else:
                gap, rest = divmod(state, top)
                step -= gap
                state = rest * base + choice
            count -= 1
            refresh[step] = True
        return refresh


def solve_fronts(prices: FloatArray, history: int) -> Front:
    """Fronts of several units at once.

    Args:
        prices: (U, T, L, J+1), infinite where a cell cannot be cached.
        history: H, how many refreshes before the anchor may serve as base.
    """
    units, steps, lags, _ = prices.shape
    gaps = min(lags + 1, steps)
    states = (gaps + 1) ** history
    chunk = max(1, min(units, _MAX_CELLS // (steps * states * min(gaps, 16))))
    values, last, back = [], [], []
    for first in range(0, units, chunk):
        part = _solve_chunk(prices[first : first + chunk], gaps, history)
        values.append(part[0])
        last.append(part[1])
        back.append(part[2])
    return Front(np.concatenate(values), np.concatenate(last), tuple(back), chunk, gaps, history)


def _offsets(gaps: int, history: int) -> NDArray[np.integer[Any]]:
    """(K, H+1) span of each allowed base in each state; -1 where there is none."""
    base = gaps + 1
    state = np.arange(base**history)
    offsets = np.zeros((base**history, history + 1), dtype=np.int64)
    missing = np.zeros(base**history, dtype=bool)
    for depth in range(1, history + 1):
        gap = state // base ** (history - depth) % base
        missing |= gap == 0
        offsets[:, depth] = np.where(missing, -1, np.maximum(offsets[:, depth - 1], 0) + gap)
    return offsets


def _solve_chunk(
    prices: FloatArray, gaps: int, history: int
) -> tuple[FloatArray, NDArray[np.integer[Any]], tuple[NDArray[np.unsignedinteger[Any]], ...]]:
    units, steps, _, columns = prices.shape
    base = gaps + 1
    states, top = base**history, base ** max(history - 1, 0)
    offsets = _offsets(gaps, history)
    allowed = (offsets >= 0) & (offsets < columns)
    column = np.where(allowed, offsets, 0)

    tables: dict[int, FloatArray] = {}
    segments: dict[int, FloatArray] = {}
    back: list[NDArray[np.unsignedinteger[Any]]] = []
    values = np.full((units, steps + 1), np.inf)
    last = np.zeros((units, steps + 1), dtype=np.int64)
    for step in range(steps):
        # Row n holds exactly n refreshes, of which `step` is the last: n <= step + 1.
        table = np.full((units, step + 2, states), np.inf)
        choice = np.zeros((units, step + 2, states), dtype=np.min_scalar_type(gaps))
        if step == 0:
            table[:, 1, 0] = 0.0
        for gap in range(1, min(gaps, step) + 1):
            before = step - gap
            reached = tables[before] + segments[before][:, gap - 1, None]
            if history == 0:
                better = reached < table[:, 1 : before + 3]
                np.copyto(table[:, 1 : before + 3], reached, where=better)
                choice[:, 1 : before + 3][better] = gap
            else:
                folded = reached.reshape(units, before + 2, top, base)
                best = folded.argmin(axis=3)
                window = slice(gap * top, (gap + 1) * top)
                table[:, 1 : before + 3, window] = np.take_along_axis(
                    folded, best[..., None], axis=3
                )[..., 0]
                choice[:, 1 : before + 3, window] = best
        tables[step] = table
        back.append(choice)
        segments[step] = _segments(prices, step, min(gaps, steps - step), column, allowed)
        tables.pop(step - gaps, None)
        segments.pop(step - gaps, None)
        if steps - step <= gaps:
            total = (table + segments[step][:, steps - step - 1, None]).reshape(
                units, step + 2, states
            )
            state = total.argmin(axis=2)
            price = np.take_along_axis(total, state[..., None], axis=2)[..., 0]
            view = values[:, : step + 2]
            better = price < view
            last[:, : step + 2] = np.where(better, step * states + state, last[:, : step + 2])
            np.minimum(view, price, out=view)
    return values, last, tuple(back)


def _segments(
    prices: FloatArray,
    anchor: int,
    count: int,
    column: NDArray[np.integer[Any]],
    allowed: BoolArray,
) -> FloatArray:
    """(U, count, K) price of a segment that starts at `anchor` and ends 1..count steps later."""
    units = len(prices)
    totals = np.zeros((units, count, len(column)))
    if count > 1:
        lag = np.arange(count - 1)
        cells = prices[:, anchor + 1 + lag, lag]
        options = np.where(allowed, cells[:, :, column], np.inf)
        np.cumsum(options.min(axis=3), axis=1, out=totals[:, 1:])
    return totals
