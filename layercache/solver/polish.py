"""Schedules searched on the predicted final error with its gains.

The dynamic programme is exact for the separable objective, which cannot see that errors cancel.
This search (`solver.anneal`) starts from its schedule and lowers the mean log of the final error
predicted for prompts left out of the gains' fit.

All of it happens on the Gram matrix of the T velocities of each prompt, so an evaluation takes less
than a millisecond; groups play no part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from layercache.solver.anneal import ScheduleSearch
from layercache.solver.gains import AffineError, mean_log10
from layercache.solver.pricing import STEP_SPANS
from layercache.solver.problem import BoolArray, FloatArray
from layercache.stats import CalibrationStats

RIDGE = 0.03


@dataclass(frozen=True)
class _Cells:
    """Coefficients of all errors over the T velocities: constants (T, T) and variables (n, T)."""

    constant: FloatArray
    rows: FloatArray
    own: FloatArray
    at: tuple[int, ...]
    correction: BoolArray


class StepPolish(ScheduleSearch):
    """Evaluates step schedules from the Gram matrices of velocities.

    Example:
        >>> polished = StepPolish(stats).search(run)  # doctest: +SKIP
        >>> polished.sum() == run.sum()  # doctest: +SKIP
        True

    Args:
        stats: Calibration statistics.
        forced: Steps that stay computed.
        max_gap: Most steps between a skipped step and its anchor.
        seed: Of the annealing.
    """

    def __init__(
        self,
        stats: CalibrationStats,
        *,
        forced: frozenset[int] = frozenset(),
        max_gap: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(forced=forced, max_gap=max_gap, seed=seed)
        velocities = np.asarray(stats.velocities, dtype=np.float64)
        self.gram: FloatArray = velocities @ velocities.swapaxes(1, 2)
        self.sigmas = np.asarray(stats.sigmas, dtype=np.float64)
        self.weight: FloatArray = stats.propagation**2

    def score(self, run: BoolArray) -> float:
        """Mean log10 of the final squared error on prompts left out; infinite if impossible."""
        cells = self._cells(run)
        if cells is None:
            return float("inf")
        steps = np.arange(len(run))
        at = np.array(cells.at, dtype=int)
        later = self.weight[np.maximum(at[:, None], at)]
        crossed = self.weight[np.maximum(at[:, None], steps)]
        alone = self.weight[np.maximum(steps[:, None], steps)]
        seen, own = cells.rows @ self.gram, cells.own
        system = AffineError(
            constant=((cells.constant @ self.gram @ cells.constant.T) * alone).sum(axis=(1, 2)),
            linear=((seen @ cells.constant.T) * crossed).sum(axis=2),
            gram=(seen @ cells.rows.T) * later,
            inner=self.weight[at] * (seen * own).sum(axis=2),
            norm=self.weight[at] * (seen * cells.rows).sum(axis=2),
            place=tuple((0, step) for step in cells.at),
            correction=cells.correction,
        )
        return mean_log10(system.leave_one_out(RIDGE))

    def _cells(self, run: BoolArray) -> _Cells | None:
        steps = len(run)
        unit = np.eye(steps)
        dsigma = np.diff(self.sigmas)
        constant = np.zeros((steps, steps))
        rows, own, at, moves = [], [], [], []
        done: list[int] = []
        for step in range(steps):
            if run[step]:
                if done and len(done) < step:
                    moves.append((step, done[-1]))
                done.append(step)
                continue
            anchor = done[-1]
            if step - anchor > self.lags:
                return None
            constant[step] = dsigma[step] * (unit[anchor] - unit[step])
            if len(done) > 1 and anchor - done[-2] <= STEP_SPANS:
                base = done[-2]
                reach = (self.sigmas[step] - self.sigmas[anchor]) / (
                    self.sigmas[anchor] - self.sigmas[base]
                )
                rows.append(dsigma[step] * reach * (unit[anchor] - unit[base]))
                own.append(constant[step])
                at.append(step)
        predicted = len(rows)
        for step, before in moves:
            rows.append(dsigma[step] * (unit[step] - unit[before]))
            own.append(np.zeros(steps))
            at.append(step)
        if not rows:
            return None
        correction = np.arange(len(rows)) >= predicted
        return _Cells(constant, np.array(rows), np.array(own), tuple(at), correction)
