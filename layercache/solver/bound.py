"""Lower bound of the joint problem of skipped steps and cached groups.

What makes the joint problem hard is one coupling: a group is idle at t exactly if its step unit
skips t. Give every group its own idle cells instead, at a price pi[g, t] paid by the group and
received by the step unit, and put a price lam on each millisecond. For every lam >= 0 and pi,

    L(lam, pi) = min over step schedules of
                     prices + lam rest_ms |run| - sum of pi[g, t] over g and skipped t
               + sum over g of min over schedules of its own of
                     prices + lam ms_g |refreshed| + sum of pi[g, t] over idle t
               - lam (budget - fixed)

is below the optimum (Lagrangian decomposition, Guignard & Kim 1987), and each minimum is a shortest
path over (last refresh, gap behind it). With a step unit for each branch the first two lines stand
once for each family. A group's segment from anchor a to its next refresh c costs

    sum over a < t < c of  min(cheapest price(t, a, .), pi[g, t]),

since at each cell it caches or idles, whichever is cheaper. With a history above 1, bases further
back than the refresh before the anchor are taken as free to choose, which only lowers L. L is
concave and is climbed by subgradient steps with Polyak's length. The limit on cache bytes is left
out, which lowers L too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from layercache.solver.problem import BoolArray, Family, FloatArray, ScheduleProblem

ITERATIONS = 150
_PATIENCE = 12


def joint_bound(
    problem: ScheduleProblem,
    tables: Sequence[FloatArray | None],
    budget_ms: float,
    known: float,
) -> float:
    """A number that no schedule's objective is below.

    Args:
        problem: Any problem; the bound is worth having where a step unit governs groups.
        tables: For each of the problem's families the (G, T, L, J+1) price tables of its groups,
            padded to one shape; None for a family without groups.
        budget_ms: The budget, which need not be the problem's.
        known: Objective of some feasible schedule; climbing stops when it is reached.
    """
    if known <= 0:
        return 0.0
    parts = [
        _Part(problem, family, table)
        for family, table in zip(problem.families, tables, strict=True)
    ]
    room = budget_ms - problem.fixed_ms
    # Milliseconds are counted in mean refreshes, so that all multipliers are prices of one cell.
    ms = np.concatenate([part.ms for part in parts])
    unit_ms = max(float(ms.mean()) if len(ms) else 0.0, *(p.step_ms for p in parts), 1e-12)
    full = problem.num_steps * (float(ms.sum()) + sum(part.step_ms for part in parts))
    lam = 2 * known / max(full - room, unit_ms)
    pis = [np.repeat((lam * part.ms)[:, None], problem.num_steps, axis=1) for part in parts]
    lam *= unit_ms
    best, best_at, factor, since = 0.0, (lam, pis), 1.0, 0
    for _ in range(ITERATIONS):
        price_ms = lam / unit_ms
        low, spent, slopes = -price_ms * room, 0.0, []
        for part, pi in zip(parts, pis, strict=True):
            value, cost, slope = part.solve(price_ms, pi)
            low, spent = low + value, spent + cost
            slopes.append(slope)
        if low > best:
            best, best_at, since = low, (lam, pis), 0
        else:
            since += 1
            if since >= _PATIENCE:
                # Back to the best point with shorter steps.
                (lam, pis), factor, since = best_at, factor / 2, 0
                if factor < 1e-3:
                    break
                continue
        along_lam = (spent - room) / unit_ms
        length = along_lam**2 + sum(float((slope**2).sum()) for slope in slopes)
        if length == 0 or best >= known * (1 - 1e-9):
            break
        size = factor * (known - low) / length
        lam = max(lam + size * along_lam, 0.0)
        pis = [pi + size * slope for pi, slope in zip(pis, slopes, strict=True)]
    return float(min(best, known))


class _Part:
    """One family's share of L: its step unit's shortest path and those of its groups."""

    def __init__(self, problem: ScheduleProblem, family: Family, groups: FloatArray | None) -> None:
        steps = problem.num_steps
        self.step_ms, reach = 0.0, 0
        self.whole: Paths | None = None
        if family.step is not None:
            table = problem.prices[family.step][None]
            self.step_ms = problem.units[family.step].refresh_ms
            reach = table.shape[1]
            self.whole = Paths(table, min(reach + 1, steps), problem.history)
        self.ms = np.array([problem.units[group].refresh_ms for group in family.groups])
        self.groups: Paths | None = None
        if groups is not None:
            longest = min(groups.shape[2] + reach + 1, steps)
            self.groups = Paths(groups, longest, problem.history)
        # Where a group may not be left idle.
        self.blocked = np.zeros(steps, dtype=bool)
        self.blocked[[0, *sorted(problem.forced)]] = True
        if self.whole is None:
            self.blocked[:] = True

    def solve(self, price_ms: float, pi: FloatArray) -> tuple[float, float, FloatArray]:
        """The minimum, the milliseconds that it spends, and the slope along pi (G, T)."""
        value, spent, slope = 0.0, 0.0, np.zeros_like(pi)
        if self.whole is not None:
            # The step unit's skipped cell is priced by its table and rewarded by all groups.
            reward = -pi.sum(axis=0)[None]
            least, run, _ = self.whole.solve(np.array([price_ms * self.step_ms]), reward=reward)
            value += float(least.sum())
            spent += float(run.sum()) * self.step_ms
            slope -= ~run[0]
        if self.groups is not None:
            idle_price = np.where(self.blocked, np.inf, pi)
            each, refreshed, idle = self.groups.solve(price_ms * self.ms, idle=idle_price)
            value += float(each.sum())
            spent += float(refreshed.sum(axis=1) @ self.ms)
            slope += idle
        slope[:, self.blocked] = 0.0
        return value, spent, slope


class Paths:
    """Shortest paths of U units over (last refresh, gap behind it), with idle cells."""

    def __init__(self, prices: FloatArray, reach: int, history: int) -> None:
        self.units, self.steps, lags, columns = prices.shape
        self.reach, self.gaps = reach, columns - 1
        # best[u, t, i, d]: cheapest price with anchor t-1-i, whose refresh before lies d behind it
        # (d = 0: too far to be a base).
        best = np.repeat(prices[..., :1], columns, axis=3)
        if history >= 1:
            best[..., 1:] = np.minimum(best[..., 1:], prices[..., 1:])
        if history >= 2 and columns > 2:
            # Bases behind the gap d: any distance above d.
            suffix = np.minimum.accumulate(prices[..., ::-1], axis=3)[..., ::-1]
            best[..., 1:-1] = np.minimum(best[..., 1:-1], suffix[..., 2:])
        # cells[u, a, i, d]: the same by anchor, infinite beyond the end and beyond the last lag.
        cells = np.full((self.units, self.steps, reach - 1, columns), np.inf)
        for lag in range(min(lags, reach - 1)):
            stop = self.steps - 1 - lag
            if stop > 0:
                cells[:, :stop, lag] = best[:, 1 + lag :, lag]
        self.cells = cells
        self.lags = np.arange(reach)
        start, behind = np.ogrid[: self.steps, : reach - 1]
        self.step_of = np.minimum(start + 1 + behind, self.steps - 1)

    def solve(
        self,
        refresh_price: FloatArray,
        *,
        idle: FloatArray | None = None,
        reward: FloatArray | None = None,
    ) -> tuple[FloatArray, BoolArray, BoolArray]:
        """Least totals (U,), and where the minimisers refresh and idle, (U, T) each.

        `idle` (U, T) prices a cell that is left idle instead of cached; `reward` (U, T) is added to
        the price of every cell that is not refreshed.
        """
        units, steps, reach = self.units, self.steps, self.reach
        cells = self.cells
        if reward is not None:
            cells = cells + reward[:, self.step_of][..., None]
        if idle is not None:
            cells = np.minimum(cells, idle[:, self.step_of][..., None])
        # segments[u, a, g-1, d]: all cells between a and its next refresh at a + g.
        segments = np.zeros((units, steps, reach, self.gaps + 1))
        np.cumsum(cells, axis=2, out=segments[:, :, 1:])
        table = np.full((units, steps + 1, self.gaps + 1), np.inf)
        table[:, 0, 0] = refresh_price
        # state[u, c, g-1]: best gap behind the anchor c - g; far[u, c]: best g beyond all spans.
        state = np.zeros((units, steps + 1, reach), dtype=np.int64)
        far = np.zeros((units, steps + 1), dtype=np.int64)
        for step in range(1, steps + 1):
            count = min(step, reach)
            before = step - 1 - self.lags[:count]
            options = table[:, before] + segments[:, before, self.lags[:count]]
            value = options.min(axis=2)
            state[:, step, :count] = options.argmin(axis=2)
            near = min(count, self.gaps) if step < steps else 0
            table[:, step, 1 : near + 1] = value[:, :near] + refresh_price[:, None]
            if count > near:
                far[:, step] = value[:, near:].argmin(axis=1) + near + 1
                table[:, step, 0] = value[:, near:].min(axis=1) + refresh_price
        total = table[:, steps, 0] - refresh_price
        refreshed = np.zeros((units, steps), dtype=bool)
        idle_at = np.zeros((units, steps), dtype=bool)
        for unit in range(units):
            end, gap = steps, 0
            while end > 0:
                behind = gap or int(far[unit, end])
                start, gap = end - behind, int(state[unit, end, behind - 1])
                refreshed[unit, start] = True
                if idle is not None and behind > 1:
                    cached = self.cells[unit, start, : behind - 1, gap]
                    idle_at[unit, start + 1 : end] = idle[unit, start + 1 : end] < cached
                end = start
        return total, refreshed, idle_at
