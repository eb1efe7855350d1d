"""Multiple-choice knapsack: one option a unit, least total error, within time and memory.

    minimise  sum_u error[u, k_u]   s.t.  sum_u cost[u, k_u] <= C,  sum_u bytes[u, k_u] <= B

1. *Dual bound.* For multipliers lam, mu >= 0,
   L(lam, mu) = sum_u min_k (error + lam cost + mu bytes) - lam C - mu B  is below the optimum.
2. *Labels.* Units are added one at a time. A label is the (cost, bytes, error) of a partial choice.
   A label that another one equals or beats in all three is dropped (Nemhauser & Ullmann 1969), and
   so is one whose bound L + sum of reduced costs reaches the best known total: the reduced cost of
   an option is what it adds to its unit's minimum above, so the bound of a partial choice is known
   at once.
3. *Beam.* At most `width` labels of the best bounds are kept; the least bound dropped for lack of
   room is remembered. The width grows until nothing was dropped that could have mattered: then the
   result is optimal. Otherwise the least bound dropped is a true lower bound.

Costs are real numbers: nothing is rounded. Integral data make ties, which cost nothing; measured
times make few, which the bound of step 2 makes up for.

Sources: Nemhauser & Ullmann, "Discrete dynamic programming and capital allocation", Management
Science 15 (1969); Kellerer, Pferschy & Pisinger, "Knapsack Problems" (2004), chapter 11. The beam
with a certificate is this project's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layercache.solver.problem import FloatArray

_WIDTHS = (500, 8_000, 100_000)
_TIE = 1e-11


@dataclass(frozen=True, eq=False)
class Options:
    """One unit's alternatives: arrays of equal length."""

    cost: FloatArray
    size: FloatArray
    error: FloatArray


@dataclass(frozen=True)
class Choice:
    """One option a unit, the total error and a lower bound of it."""

    picks: tuple[int, ...]
    error: float
    lower_bound: float


def solve_knapsack(units: Sequence[Options], cost_limit: float, size_limit: float) -> Choice | None:
    """Choose one option a unit; None if no choice respects both limits."""
    kept = [_undominated(unit) for unit in units]
    if any(len(index) == 0 for index in kept):
        return None
    reduced = [Options(u.cost[i], u.size[i], u.error[i]) for u, i in zip(units, kept, strict=True)]
    if sum(u.size.min() for u in reduced) > size_limit:
        return None
    if sum(u.cost.min() for u in reduced) > cost_limit:
        return None
    bound, lam, mu = _dual_bound(reduced, cost_limit, size_limit)
    best = _feasible_start(reduced, cost_limit, size_limit)
    if best is not None and not best.picks:
        return None
    for width in _WIDTHS:
        best = _search(reduced, cost_limit, size_limit, bound, lam, mu, width, best)
        if best is not None and best.lower_bound >= best.error * (1 - 1e-10):
            break
    if best is None:
        return None
    picks = tuple(int(i[k]) for i, k in zip(kept, best.picks, strict=True))
    return Choice(picks, best.error, min(best.lower_bound, best.error))


def _feasible_start(
    units: Sequence[Options], cost_limit: float, size_limit: float
) -> Choice | None:
    """With two limits: the cheapest choice within the size limit, empty if even it costs too much.

    With one limit the search itself always keeps a label that can be completed.
    """
    if not np.isfinite(size_limit) or not np.isfinite(cost_limit):
        return None
    swapped = [Options(np.zeros_like(u.cost), u.size, u.cost) for u in units]
    cheapest = solve_knapsack(swapped, np.inf, size_limit)
    if cheapest is None or cheapest.error > cost_limit:
        return Choice((), np.inf, np.inf)
    error = float(sum(u.error[k] for u, k in zip(units, cheapest.picks, strict=True)))
    return Choice(cheapest.picks, error, -np.inf)


def least_cost(units: Sequence[Options], size_limit: float) -> float:
    """Smallest total cost of any choice within `size_limit`; infinite if there is none."""
    swapped = []
    for unit in units:
        finite = np.isfinite(unit.error)
        zero = np.zeros(int(finite.sum()))
        swapped.append(Options(zero, unit.size[finite], unit.cost[finite]))
    choice = solve_knapsack(swapped, np.inf, size_limit)
    return np.inf if choice is None else choice.error


def _undominated(unit: Options) -> NDArray[np.integer[Any]]:
    index = np.flatnonzero(np.isfinite(unit.error))
    keep = _skyline(unit.cost[index], unit.size[index], unit.error[index])
    result: NDArray[np.integer[Any]] = index[keep]
    return result


def _skyline(cost: FloatArray, size: FloatArray, error: FloatArray) -> NDArray[np.integer[Any]]:
    """Indices of the points that no other point equals or beats in all three coordinates."""
    order = np.lexsort((error, size, cost))
    size, error = size[order], error[order]
    keep = np.zeros(len(order), dtype=bool)
    levels = np.unique(size)
    for level in levels:
        least = np.minimum.accumulate(np.where(size <= level, error, np.inf))
        before = np.concatenate([[np.inf], least[:-1]])
        keep |= (size == level) & (error < before)
    return order[keep]


def _dual_bound(
    units: Sequence[Options], cost_limit: float, size_limit: float
) -> tuple[float, float, float]:
    """Multipliers with a good L(lam, mu), by ternary search over mu around bisection over lam."""
    widest = max(len(u.cost) for u in units)

    def padded(name: str, fill: float) -> FloatArray:
        table = np.full((len(units), widest), fill)
        for row, unit in zip(table, units, strict=True):
            values = getattr(unit, name)
            row[: len(values)] = values
        return table

    cost, size, error = padded("cost", 0.0), padded("size", 0.0), padded("error", np.inf)
    rows = np.arange(len(units))
    finite = error[np.isfinite(error)]
    top = max(float(finite.max()) * len(units), 1e-300)

    def value(lam: float, mu: float) -> tuple[float, float]:
        """L and the cost of the minimiser; a limit of infinity takes part with multiplier 0."""
        total = error + lam * cost + mu * size
        pick = total.argmin(axis=1)
        low = float(total[rows, pick].sum())
        low -= (lam * cost_limit if lam else 0.0) + (mu * size_limit if mu else 0.0)
        return low, float(cost[rows, pick].sum())

    def best_lam(mu: float) -> tuple[float, float]:
        low, spent = value(0.0, mu)
        if spent <= cost_limit:
            return low, 0.0
        below, above = 0.0, top / max(float(cost.max()), 1e-300)
        for _ in range(200):
            if value(above, mu)[1] <= cost_limit:
                break
            below, above = above, above * 8
        for _ in range(60):
            middle = (below + above) / 2
            if value(middle, mu)[1] <= cost_limit:
                above = middle
            else:
                below = middle
        return max((value(lam, mu)[0], lam) for lam in (below, above))

    low, lam = best_lam(0.0)
    result = (low, lam, 0.0)
    if np.isfinite(size_limit) and float(size.max(initial=0.0)) > 0:
        left, right = 0.0, top / float(size[size > 0].min())
        for _ in range(50):
            first, second = left + (right - left) / 3, right - (right - left) / 3
            one, two = best_lam(first), best_lam(second)
            result = max(result, (one[0], one[1], first), (two[0], two[1], second))
            if one[0] < two[0]:
                left = first
            else:
                right = second
    return result


def _search(
    units: Sequence[Options],
    cost_limit: float,
    size_limit: float,
    bound: float,
    lam: float,
    mu: float,
    width: int,
    known: Choice | None,
) -> Choice | None:
    """One pass over all units with at most `width` labels."""
    target = np.inf if known is None else known.error
    dropped = np.inf
    rest_cost = np.cumsum([u.cost.min() for u in units][::-1])[::-1]
    rest_size = np.cumsum([u.size.min() for u in units][::-1])[::-1]
    cost, size, error, slack = (np.zeros(1) for _ in range(4))
    trail: list[tuple[NDArray[np.integer[Any]], NDArray[np.integer[Any]]]] = []
    for position, unit in enumerate(units):
        total = unit.error + lam * unit.cost + mu * unit.size
        extra = total - total.min()
        last = position + 1 == len(units)
        need_cost = 0.0 if last else rest_cost[position + 1]
        need_size = 0.0 if last else rest_size[position + 1]
        new_slack = slack[:, None] + extra
        new_cost, new_size = cost[:, None] + unit.cost, size[:, None] + unit.size
        # Reaching the known total is no gain, so such a label is not needed for optimality.
        live = (
            bound + new_slack < target - _TIE * abs(target)
            if np.isfinite(target)
            else (np.ones_like(new_slack, dtype=bool))
        )
        live &= (new_cost + need_cost <= cost_limit) & (new_size + need_size <= size_limit)
        parent, option = np.nonzero(live)
        if not len(parent):
            return _settled(known, bound, dropped)
        cost, size, slack = new_cost[live], new_size[live], new_slack[live]
        error = error[parent] + unit.error[option]
        kept = _skyline(cost, size, error)
        if len(kept) > width:
            # The cheapest and the smallest label stay, so that a feasible choice is always found.
            safe = {int(np.argmin(cost[kept])), int(np.argmin(size[kept]))}
            order = np.argsort(slack[kept], kind="stable")
            spare = np.array([k for k in order[width:] if int(k) not in safe], dtype=np.int64)
            if len(spare):
                dropped = min(dropped, bound + float(slack[kept][spare].min()))
            kept = kept[np.sort([*order[:width], *(safe - set(order[:width].tolist()))])]
        cost, size, slack, error = cost[kept], size[kept], slack[kept], error[kept]
        trail.append((parent[kept], option[kept]))
    winner = int(error.argmin())
    found = float(error[winner])
    if not found < target:
        return _settled(known, bound, dropped)
    picks = []
    row = winner
    for parents, options in reversed(trail):
        picks.append(int(options[row]))
        row = int(parents[row])
    return _settled(Choice(tuple(reversed(picks)), found, -np.inf), bound, dropped)


def _settled(choice: Choice | None, bound: float, dropped: float) -> Choice | None:
    """The choice with its lower bound: the least bound that was dropped, or its own total."""
    if choice is None:
        return None
    lower = max(choice.lower_bound, bound, min(dropped, choice.error))
    return Choice(choice.picks, choice.error, min(lower, choice.error))
