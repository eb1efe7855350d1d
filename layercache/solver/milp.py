"""`milp`: the schedule problem as a mixed-integer linear programme, solved by HiGHS.

The reference that `dp` is tested against: a direct transcription of the problem, which shares no
idea with the dynamic programme. Binary y[u,t] says that unit u is computed at t, binary
x[u,t,a,b] that it is cached with anchor a and base b (b = a: reuse).

    minimise    sum price x
    subject to  y[u,t] + sum_ab x[u,t,a,b] + skip[t] = 1           (step unit: no skip)
                sum_b x[u,t,a,b] <= y[u,a]
                sum_b x[u,t,a,b] <= 1 - y[u,s]                      a < s < t
                sum_{a} x[u,t,a,b] <= y[u,b]                        b < a
                sum_b x[u,t,a,b] <= 1 - y[u,s]                      b < s < a
                fixed + sum ms y <= budget
                sum (reserved bytes used[u]) <= max_cache_bytes,  used[u] >= x[u,t,a,b]

where skip[t] = 1 - y[step,t] if a step unit governs u and 0 otherwise. Cells of infinite price are
left out. `mip_rel_gap=0` asks for a proven optimum; on a time limit the best schedule found comes
back with the bound reached and says so.

Complexity: exponential in general. Source: `scipy.optimize.milp`; HiGHS (Huangfu & Hall 2018).
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_matrix

from layercache.errors import LayerCacheError
from layercache.solver._solution import ScheduleSolution, build_solution
from layercache.solver.problem import FloatArray, IntArray, ScheduleProblem, budget_error

TIME_LIMIT_S = 120.0
_OPTIMAL, _TIME_LIMIT, _INFEASIBLE = 0, 1, 2
# HiGHS keeps constraints to 1e-6, and its bound is only as sharp as that.
_GAP = 1e-6


class SolverTimeout(LayerCacheError, TimeoutError):
    """The time limit passed before any schedule was found."""


class _Model:
    """Columns and rows of the programme, gathered in triplets."""

    def __init__(self) -> None:
        self.price: list[float] = []
        self.upper: list[float] = []
        self.integral: list[int] = []
        self.entries: tuple[list[int], list[int], list[float]] = ([], [], [])
        self.low: list[float] = []
        self.high: list[float] = []
        self.scale = 1.0

    def column(self, price: float = 0.0, upper: float = 1.0, integral: bool = True) -> int:
        self.price.append(price)
        self.upper.append(upper)
        self.integral.append(int(integral))
        return len(self.price) - 1

    def row(self, terms: list[tuple[int, float]], low: float, high: float) -> None:
        rows, columns, values = self.entries
        for column, value in terms:
            rows.append(len(self.low))
            columns.append(column)
            values.append(value)
        self.low.append(low)
        self.high.append(high)


def solve(problem: ScheduleProblem, time_limit_s: float = TIME_LIMIT_S) -> ScheduleSolution:
    """Solve to proven optimality, or say how far it came.

    Args:
        problem: Any schedule problem.
        time_limit_s: Seconds after which the best schedule so far is returned, with the status
            `"time_limit"` and a true lower bound.

    Raises:
        BudgetError: No schedule fits (proven); the message gives the smallest feasible budget, or
            the smallest that was found in `time_limit_s`.
        SolverTimeout: The time ran out before any schedule was found.
    """
    model, computed = _transcribe(problem)
    result = _run(model, time_limit_s)
    if result.status == _INFEASIBLE:
        least, proven = _least_cost(problem, time_limit_s)
        raise budget_error(problem, least, proven=proven)
    if result.x is None:
        raise SolverTimeout(
            f"HiGHS found no schedule within {time_limit_s:g} s ({result.message}); raise "
            'time_limit_s, or use solver="dp"'
        )
    picked = np.round(result.x).astype(bool)
    masks = [picked[columns] for columns in computed]
    bound = 0.0 if result.mip_dual_bound is None else float(result.mip_dual_bound)
    return build_solution(
        problem,
        masks,
        solver="milp",
        lower_bound=max(bound / model.scale, 0.0),
        tolerance=_GAP,
        time_limit=result.status == _TIME_LIMIT,
    )


def _run(model: _Model, time_limit_s: float) -> OptimizeResult:
    shape = (len(model.low), len(model.price))
    rows, columns, values = model.entries
    return milp(
        np.array(model.price) * model.scale,
        integrality=np.array(model.integral),
        bounds=Bounds(0, np.array(model.upper)),
        constraints=LinearConstraint(
            csr_matrix((values, (rows, columns)), shape=shape),
            np.array(model.low),
            np.array(model.high),
        ),
        # milp takes keys out of the dict it is given, so it gets a new one each time.
        options={"mip_rel_gap": 0.0, "time_limit": time_limit_s},
    )


def _least_cost(problem: ScheduleProblem, time_limit_s: float) -> tuple[float, bool]:
    """Smallest cost of any schedule that was found, and whether there is proven to be no smaller.

    Full compute is always feasible, so that something is found even if the time runs out at once.
    """
    model, computed = _transcribe(problem, budget=False)
    model.price = [0.0] * len(model.price)
    for unit, columns in zip(problem.units, computed, strict=True):
        for column, milliseconds in zip(columns, unit.compute_ms, strict=True):
            model.price[column] = float(milliseconds)
    result = _run(model, time_limit_s)
    if result.x is None:
        full = sum(float(unit.compute_ms.sum()) for unit in problem.units)
        return problem.fixed_ms + full, False
    return problem.fixed_ms + float(result.fun) / model.scale, result.status == _OPTIMAL


def _transcribe(problem: ScheduleProblem, budget: bool = True) -> tuple[_Model, list[IntArray]]:
    """The programme, and the columns y of each unit."""
    model, steps = _Model(), problem.num_steps
    computed = [np.array([model.column() for _ in range(steps)], dtype=int) for _ in problem.units]
    bytes_row: list[tuple[int, float]] = []
    for unit, y, prices in zip(problem.units, computed, problem.prices, strict=True):
        used = model.column(integral=False)
        bytes_row.append((used, float(unit.reserved(problem.history))))
        model.row([(int(y[0]), 1.0)], 1.0, 1.0)
        for step in range(steps):
            cells = _cells(model, prices, step)
            cover = [(int(y[step]), 1.0)] + [(x, 1.0) for *_, x in cells]
            if problem.step is None or unit.kind == "step":
                model.row(cover, 1.0, 1.0)
            elif step in problem.forced:
                model.row([(int(y[step]), 1.0)], 1.0, 1.0)
            else:
                # skip[t] = 1 - y[step, t]
                model.row([*cover, (int(computed[problem.step][step]), -1.0)], 0.0, 0.0)
            _read(model, y, step, cells)
            if cells:
                model.row([(used, 1.0)] + [(x, -1.0) for *_, x in cells], 0.0, np.inf)
    spent = [
        (int(column), float(milliseconds))
        for unit, y in zip(problem.units, computed, strict=True)
        for column, milliseconds in zip(y, unit.compute_ms, strict=True)
    ]
    if budget:
        model.row(spent, -np.inf, problem.budget_limit - problem.fixed_ms)
    if problem.max_cache_bytes is not None:
        model.row(bytes_row, -np.inf, float(problem.max_cache_bytes))
    # HiGHS stops at an absolute gap of 1e-6, so a typical price is brought near 4096; by a power of
    # two, which rounds nothing.
    positive = [price for price in model.price if price > 0]
    if positive:
        model.scale = float(2.0 ** (12 - np.floor(np.log2(np.median(positive)))))
    return model, computed


def _read(model: _Model, y: IntArray, step: int, cells: list[tuple[int, int, int]]) -> None:
    """Rows that make anchors and bases the last two computed steps before a cached cell."""
    for anchor in {a for a, _, _ in cells}:
        here = [(x, 1.0) for a, _, x in cells if a == anchor]
        model.row([*here, (int(y[anchor]), -1.0)], -np.inf, 0.0)
        for between in range(anchor + 1, step):
            model.row([*here, (int(y[between]), 1.0)], -np.inf, 1.0)
    for anchor, base, x in cells:
        if base < anchor:
            model.row([(x, 1.0), (int(y[base]), -1.0)], -np.inf, 0.0)
            for between in range(base + 1, anchor):
                model.row([(x, 1.0), (int(y[between]), 1.0)], -np.inf, 1.0)


def _cells(model: _Model, prices: FloatArray, step: int) -> list[tuple[int, int, int]]:
    """(anchor, base, column) of every way to cache one cell; base = anchor is reuse."""
    cells = []
    for lag in range(min(prices.shape[1], step)):
        anchor = step - 1 - lag
        for span in range(min(prices.shape[2], anchor + 1)):
            price = float(prices[step, lag, span])
            if np.isfinite(price):
                cells.append((anchor, anchor - span, model.column(price)))
    return cells
