"""Annealing over step schedules, on the predicted final error with its gains.

The dynamic programme is exact for the separable objective, which cannot see that errors cancel.
This search starts from its schedule and moves one computed step at a time, their number unchanged,
to lower the mean log of the final error predicted for prompts left out of the gains' fit:

1. *Annealing* (Kirkpatrick, Gelatt & Vecchi 1983): a random computed step moves to a near place or
   to any, and a worse score is taken with probability exp(-rise / temperature), the temperature
   falling to zero. About T^2 evaluations with a fixed seed: the same statistics give the same plan.
2. *Climbing*: single moves to near places for as long as one helps.

All of it happens on the Gram matrix of the T velocities of each prompt, so an evaluation takes less
than a millisecond; groups play no part. It is a heuristic and proves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from layercache.solver.gains import AffineError, mean_log10
from layercache.solver.pricing import STEP_LAGS, STEP_SPANS
from layercache.solver.problem import BoolArray, FloatArray
from layercache.stats import CalibrationStats

RIDGE = 0.03
MOVES = (1, -1, 2, -2, 3, -3)
NEAR_SHARE = 0.6
TEMPERATURE = 0.02
"""In units of the score, mean log10 of the squared error: 0.2 dB."""
EVALUATIONS = 1.2
"""Annealing moves tried, as a multiple of T^2."""


@dataclass(frozen=True)
class _Cells:
    """Coefficients of all errors over the T velocities: constants (T, T) and variables (n, T)."""

    constant: FloatArray
    rows: FloatArray
    own: FloatArray
    at: tuple[int, ...]
    correction: BoolArray


class StepPolish:
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
        self.forced = forced | {0}
        self.lags = STEP_LAGS if max_gap is None else min(STEP_LAGS, max_gap)
        self.seed = seed
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

    def search(self, run: BoolArray) -> BoolArray:
        """The best schedule found by annealing and climbing, its number of steps unchanged."""
        return self.climb(self.anneal(run))

    def anneal(self, run: BoolArray) -> BoolArray:
        """The best schedule met by random moves under a falling temperature."""
        best, least = run, self.score(run)
        if not np.isfinite(least) or run.all():
            return best
        current, value = best, least
        rng = np.random.default_rng(self.seed)
        trials = int(EVALUATIONS * len(run) ** 2)
        for trial in range(trials):
            step = int(rng.choice(np.flatnonzero(current)))
            near = rng.random() < NEAR_SHARE
            target = step + int(rng.choice(MOVES)) if near else int(rng.integers(len(run)))
            if not self._movable(current, step, target):
                continue
            moved = _moved(current, step, target)
            score = self.score(moved)
            temperature = TEMPERATURE * (1 - trial / trials)
            if score < value or rng.random() < np.exp((value - score) / temperature):
                current, value = moved, score
            if score < least:
                best, least = moved, score
        return best

    def climb(self, run: BoolArray) -> BoolArray:
        """A schedule that no move of one step to a near place improves."""
        best, least = run, self.score(run)
        improved = bool(np.isfinite(least))
        while improved:
            improved = False
            for step in np.flatnonzero(best).tolist():
                for target in (step + move for move in MOVES):
                    if not self._movable(best, step, target):
                        continue
                    moved = _moved(best, step, target)
                    score = self.score(moved)
                    if score < least:
                        best, least, improved = moved, score, True
                        break
        return best

    def _movable(self, run: BoolArray, step: int, target: int) -> bool:
        inside = 0 <= target < len(run)
        return inside and bool(run[step]) and not run[target] and step not in self.forced

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


def _moved(run: BoolArray, step: int, target: int) -> BoolArray:
    moved = run.copy()
    moved[[step, target]] = False, True
    return moved
