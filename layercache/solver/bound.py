"""Lower bound of the joint problem of skipped steps and cached groups.

What makes the joint problem hard is one coupling: a group is idle at t exactly if the step unit
skips t. Give every group its own idle cells instead, at a price pi[g, t] paid by the group and
received by the step unit, and put a price lam on each millisecond. For every lam >= 0 and pi,

    L(lam, pi) = min over step schedules of
                     prices + lam rest_ms |run| - sum of pi[g, t] over g and skipped t
               + sum over g of min over schedules of its own of
                     prices + lam ms_g |refreshed| + sum of pi[g, t] over idle t
               - lam (budget - fixed)

is below the optimum (Lagrangian decomposition, Guignard & Kim 1987), and each minimum is a shortest
path over (last refresh, gap behind it). A group's segment from anchor a to its next refresh c costs

    sum over a < t < c of  min(cheapest price(t, a, .), pi[g, t]),

since at each cell it caches or idles, whichever is cheaper. With a history above 1, bases further
back than the refresh before the anchor are taken as free to choose, which only lowers L. L is
concave and is climbed by subgradient steps with Polyak's length. The limit on cache bytes is left
out, which lowers L too.
"""

from __future__ import annotations

import numpy as np

from layercache.solver.problem import BoolArray, FloatArray, ScheduleProblem

ITERATIONS = 150
_PATIENCE = 12


def joint_bound(
    problem: ScheduleProblem, groups: FloatArray, budget_ms: float, known: float
) -> float:
    """A number that no schedule's objective is below.

    Args:
        problem: A problem with a step unit and groups.
        groups: (G, T, L, J+1) price tables of all groups, padded to one shape.
        budget_ms: The budget, which need not be the problem's.
        known: Objective of some feasible schedule; climbing stops when it is reached.
    """
    step = problem.step_unit
    if step is None or not problem.groups or known <= 0:
        return 0.0
    table = problem.price_of(step)[None]
    whole = Paths(table, min(table.shape[1] + 1, problem.num_steps), problem.history)
    reach = min(groups.shape[2] + table.shape[1] + 1, problem.num_steps)
    parts = Paths(groups, reach, problem.history)
    ms = np.array([unit.refresh_ms for unit in problem.groups])
    room = budget_ms - problem.fixed_ms
    blocked = np.zeros(problem.num_steps, dtype=bool)
    blocked[[0, *sorted(problem.forced)]] = True

    # Milliseconds are counted in mean refreshes, so that all multipliers are prices of one cell.
    unit_ms = max(float(ms.mean()), step.refresh_ms, 1e-12)
    full = problem.num_steps * (float(ms.sum()) + step.refresh_ms)
    lam = 2 * known / max(full - room, unit_ms)
    pi = np.repeat((lam * ms)[:, None], problem.num_steps, axis=1)
    lam *= unit_ms
    best, best_at, factor, since = 0.0, (lam, pi), 1.0, 0
    for _ in range(ITERATIONS):
        price_ms = lam / unit_ms
        idle_price = np.where(blocked, np.inf, pi)
        # The step unit's skipped cell is priced by its table and rewarded by all groups.
        reward = -pi.sum(axis=0)
        step_value, run, _ = whole.solve(
            np.array([price_ms * step.refresh_ms]), reward=reward[None]
        )
        value, refreshed, idle = parts.solve(price_ms * ms, idle=idle_price)
        low = float(step_value.sum() + value.sum()) - price_ms * room
        if low > best:
            best, best_at, since = low, (lam, pi), 0
        else:
            since += 1
            if since >= _PATIENCE:
                # Back to the best point with shorter steps.
                (lam, pi), factor, since = best_at, factor / 2, 0
                if factor < 1e-3:
                    break
                continue
        spent = float(run.sum()) * step.refresh_ms + float(refreshed.sum(axis=1) @ ms)
        along_lam = (spent - room) / unit_ms
        along_pi = idle.astype(float) - ~run[0]
        along_pi[:, blocked] = 0.0
        length = along_lam**2 + float((along_pi**2).sum())
        if length == 0 or best >= known * (1 - 1e-9):
            break
        size = factor * (known - low) / length
        lam, pi = max(lam + size * along_lam, 0.0), pi + size * along_pi
    return float(min(best, known))


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
