"""Gains of a fixed schedule: per cell, or for the whole trajectory at once.

Errors along a trajectory add up as vectors. With the schedule fixed, the error that prompt p's
final latent collects is affine in all gains,

    E_p(gamma) = sum over cached cells of    dsigma_t [D_a + gamma c (D_a - D_b)]
               + sum over later run steps of     dsigma_t gamma (v_t - v_previous),

with c = (sigma_t - sigma_a) / (sigma_a - sigma_b). The second sum holds *corrections*: the step
unit may add a multiple of its own last change at a computed step after the first cached one, and so
pay back errors made before (a linear multistep method). Write E_p = e_p + A_p^T gamma.
*Trajectory gains* minimise

    sum_p ||e_p + A_p^T gamma||^2 + ridge * sum_k d_k (gamma_k - gamma0_k)^2,

d_k = sum_p ||A_pk||^2, gamma0 the cell's own optimum (0 for a correction). The ridge comes from a
small grid by leave-one-prompt-out: the gains are fitted on all other prompts, and the mean log of
the squared error predicted for the one left out decides. Per-cell gains stand in the same
comparison; if they win, they are used, and the result says so.

An error made at step s has grown A_s-fold when it reaches the end (`stats.propagation`, falling in
s), but in directions that only the model knows. Write S_t for the sum of all errors made up to step
t. If each step's share of the growth turns S_t somewhere new, the squared final error is

    sum over t of (A_t^2 - A_{t+1}^2) ||S_t||^2 = sum over s, t of A_{max(s,t)}^2 <error_s, error_t>

(Abel summation; A_T = 0), which is what "squared error" means above: products of errors made at s
and t count with the growth since the later one. Errors should cancel soon, before they are
amplified.

The model is first order: it does not know how several groups cached at one step interact. That is
why the guard is there.

Source: least-squares multistep coefficients for diffusion sampling are known (for example
DPM-Solver-v3, arXiv 2310.13268, for global ones); the affine form over a caching schedule is this
project's.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from layercache.errors import LayerCacheError
from layercache.solver.pricing import STEP_NAME, cell_gains
from layercache.solver.problem import BoolArray, FloatArray, IntArray
from layercache.solver.solution import UnitSchedule
from layercache.stats import CalibrationStats

GAIN_MODES = ("none", "unit", "cell", "trajectory")
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
DECIMALS = 6


@dataclass(frozen=True, eq=False)
class GainFit:
    """Fitted gains and how they were chosen.

    Attributes:
        gains: One (T,) array a unit, 0 where no gain applies, rounded as plan files are.
        mode: The mode that is used in the end; `"cell"` if trajectory gains were refused.
        ridge: The ridge of trajectory gains, or None.
        loo_error: (P,) predicted squared error per element of each prompt, with gains fitted
            without it (for a single prompt: with it).
        note: What was decided, for a person.
    """

    gains: tuple[FloatArray, ...]
    mode: str
    ridge: float | None
    loo_error: FloatArray
    note: str

    @property
    def score(self) -> float:
        """Mean log10 of `loo_error`; lower is better. Minus infinity for an exact plan."""
        return mean_log10(self.loo_error)


@dataclass(frozen=True, eq=False)
class AffineError:
    """E_p = e_p + A_p^T gamma, by its inner products.

    Shapes: constant (P,) ||e||^2; linear (P, n) A e; gram (P, n, n) A A^T; inner and norm (P, n)
    <x_k, y_k> and ||y_k||^2 of each variable's own cell; place n pairs (unit, step).
    """

    constant: FloatArray
    linear: FloatArray
    gram: FloatArray
    inner: FloatArray
    norm: FloatArray
    place: tuple[tuple[int, int], ...]
    correction: BoolArray

    def errors(self, gains: FloatArray) -> FloatArray:
        """(P,) ||E_p||^2 under gains (n,), or (P, n) of each prompt's own."""
        gains = np.broadcast_to(gains, self.linear.shape)
        pull = 2 * self.linear + (self.gram @ gains[..., None])[..., 0]
        result: FloatArray = np.maximum(self.constant + (gains * pull).sum(axis=1), 0.0)
        return result

    def fit(self, ridge: float | None) -> FloatArray:
        """(n,) gains fitted on all prompts; with a ridge of None, each cell's own optimum."""
        result: FloatArray = self._fit(ridge, [part.sum(axis=0)[None] for part in self._parts])[0]
        return result

    def leave_one_out(self, ridge: float | None) -> FloatArray:
        """(P,) squared error of each prompt under gains fitted on all others.

        A single prompt is fitted on itself.
        """
        if len(self.constant) < 2:
            return self.errors(self.fit(ridge))
        # Sums over the others, added up instead of subtracted, so that nothing cancels.
        others = 1.0 - np.eye(len(self.constant))
        sums = [np.tensordot(others, part, axes=1) for part in self._parts]
        return self.errors(self._fit(ridge, sums))

    @property
    def _parts(self) -> tuple[FloatArray, ...]:
        return self.linear, self.gram, self.inner, self.norm

    def _fit(self, ridge: float | None, sums: Sequence[FloatArray]) -> FloatArray:
        """(K, n) gains of K fits, from sums of `_parts` over the prompts of each."""
        linear, gram, inner, norm = sums
        start: FloatArray = np.where(self.correction, 0.0, cell_gains(inner, norm))
        if ridge is None:
            return start
        weight = np.diagonal(gram, axis1=1, axis2=2)
        # A direction that no prompt excites keeps its start; the floor makes the system regular.
        floor = 1e-12 * np.maximum(weight.max(axis=1, initial=0.0, keepdims=True), 1e-300)
        scale = 1.0 / np.sqrt(np.maximum(weight, floor))
        matrix = gram * scale[:, :, None] * scale[:, None, :] + ridge * np.eye(scale.shape[1])
        pull = scale * (linear + (gram @ start[..., None])[..., 0])
        result: FloatArray = start - scale * np.linalg.solve(matrix, pull[..., None])[..., 0]
        return result


def fit_gains(
    stats: CalibrationStats,
    schedules: Sequence[UnitSchedule],
    mode: str = "trajectory",
    *,
    corrections: bool = True,
) -> GainFit:
    """Gains for every cell of a schedule.

    Args:
        stats: The statistics that priced the schedule.
        schedules: One schedule a unit; its name is `"step"` or that of one of `stats.groups`.
        mode: `"none"`, `"unit"`, `"cell"` or `"trajectory"`.
        corrections: Whether computed steps of the step unit may carry a gain (trajectory only).

    Raises:
        LayerCacheError: The mode is unknown.

    Example:
        >>> fit = fit_gains(stats, solution.units)  # doctest: +SKIP
        >>> fit.mode, fit.ridge  # doctest: +SKIP
        ('trajectory', 0.1)
    """
    if mode not in GAIN_MODES:
        raise LayerCacheError(f"gains is {mode!r}; use 'none', 'unit', 'cell' or 'trajectory'")
    with_corrections = corrections and mode == "trajectory"
    system = _assemble(stats, schedules, with_corrections)
    zeros: FloatArray = np.zeros(len(system.place))
    if mode in ("none", "unit") or not system.place:
        gains: FloatArray = np.ones_like(zeros) if mode == "unit" else zeros
        note = "gains are fixed" if mode in ("none", "unit") else "no cell predicts"
        return _finish(stats, schedules, system, gains, mode, None, None, note)
    cell_loo = system.leave_one_out(None)
    own = functools.partial(_finish, stats, schedules, system, system.fit(None), "cell", None)
    if mode == "cell":
        return own(cell_loo, "each cell's own")
    if not cell_loo.any():
        return own(cell_loo, "per-cell gains: they leave no error")
    if stats.num_prompts < 2:
        note = "per-cell gains: trajectory gains need two prompts or more to be checked"
        return own(cell_loo, note)
    trials = [(ridge, system.leave_one_out(ridge)) for ridge in RIDGES]
    ridge, loo = min(trials, key=lambda trial: mean_log10(trial[1]))
    gain_db = 10 * (mean_log10(cell_loo) - mean_log10(loo))
    if not gain_db > 0:
        note = (
            "per-cell gains: trajectory gains were predicted to lose "
            f"{-gain_db:.2f} dB on prompts left out"
        )
        return own(cell_loo, note)
    note = f"trajectory gains, ridge {ridge:g}: {gain_db:.2f} dB over per-cell on prompts left out"
    gains = system.fit(ridge)
    return _finish(stats, schedules, system, gains, "trajectory", ridge, loo, note)


def trajectory_error(
    stats: CalibrationStats,
    schedules: Sequence[UnitSchedule],
    gains: Sequence[FloatArray],
) -> FloatArray:
    """(P,) predicted mean squared error per element of the final latent."""
    system = _assemble(stats, schedules, True)
    values = np.array([gains[unit][step] for unit, step in system.place])
    return system.errors(values) / stats.numel


def predicted_psnr(stats: CalibrationStats, error: FloatArray) -> FloatArray:
    """(P,) PSNR in dB of images in [0, 1] against the uncached ones; infinite without error."""
    with np.errstate(divide="ignore"):
        result: FloatArray = -10 * np.log10(stats.image_gain * error)
    return result


def mean_log10(error: FloatArray) -> float:
    """Mean log10 of squared errors: up to constants, the mean PSNR.

    Each error counts as at least 1e-12 of the largest, or one prompt without any would decide
    alone. Minus infinity if none has any.

    Example:
        >>> round(mean_log10(np.array([1e-2, 1e-4])), 6)
        -3.0
    """
    largest = float(error.max())
    if largest <= 0:
        return -np.inf
    return float(np.log10(np.maximum(error, 1e-12 * largest)).mean())


def _finish(
    stats: CalibrationStats,
    schedules: Sequence[UnitSchedule],
    system: AffineError,
    values: FloatArray,
    mode: str,
    ridge: float | None,
    loo: FloatArray | None,
    note: str,
) -> GainFit:
    values = np.round(values, DECIMALS)
    table = tuple(np.zeros(stats.num_steps) for _ in schedules)
    for (unit, step), value in zip(system.place, values, strict=True):
        table[unit][step] = value
    error = (system.errors(values) if loo is None else loo) / stats.numel
    return GainFit(table, mode, ridge, error, note)


@dataclass(frozen=True)
class _Cell:
    """A cached cell, by the positions of its unit and steps; `base` is -1 for reuse."""

    unit: int
    step: int
    anchor: int
    base: int


def _assemble(
    stats: CalibrationStats, schedules: Sequence[UnitSchedule], corrections: bool
) -> AffineError:
    cells = [
        _Cell(unit, step, int(schedule.anchor[step]), int(schedule.base[step]))
        for unit, schedule in enumerate(schedules)
        for step in np.flatnonzero(schedule.cached).tolist()
    ]
    moves = _moves(schedules) if corrections and cells else []
    variables = [cell for cell in cells if cell.base >= 0]
    place = tuple((cell.unit, cell.step) for cell in variables)
    place += tuple((unit, step) for unit, step, _ in moves)
    at = np.array([step for _, step in place], dtype=int)
    weight = stats.propagation**2
    parts = [
        _inner_products(*_affine(stats, prompt, schedules, cells, moves), at, weight)
        for prompt in range(stats.num_prompts)
    ]
    constant, linear, gram, inner, norm = (np.array(part) for part in zip(*parts, strict=True))
    return AffineError(
        constant=constant,
        linear=linear,
        gram=gram,
        inner=inner,
        norm=norm,
        place=place,
        correction=np.arange(len(place)) >= len(variables),
    )


def _moves(schedules: Sequence[UnitSchedule]) -> list[tuple[int, int, int]]:
    """(unit, step, previous) of every run step that may carry a correction.

    None before the first cached cell: nothing has gone wrong yet, and an error made in advance
    would only have longer to grow.
    """
    first = min(int(np.flatnonzero(s.cached)[0]) for s in schedules if s.cached.any())
    found = []
    for unit, schedule in enumerate(schedules):
        if schedule.name == STEP_NAME:
            refreshes = np.flatnonzero(schedule.refresh).tolist()
            pairs = itertools.pairwise(refreshes)
            found += [(unit, step, before) for before, step in pairs if step > first]
    return found


def _affine(
    stats: CalibrationStats,
    prompt: int,
    schedules: Sequence[UnitSchedule],
    cells: Sequence[_Cell],
    moves: Sequence[tuple[int, int, int]],
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """One prompt's e by step (T, S), A (n, S), and each predicted cell's own error under reuse."""
    sigmas = np.asarray(stats.sigmas, dtype=np.float64)
    dsigma = np.diff(sigmas)
    velocity = np.asarray(stats.velocities[prompt], dtype=np.float64)
    group_of = {group.name: index for index, group in enumerate(stats.groups)}

    def delta(cell: _Cell, source: int) -> FloatArray:
        name = schedules[cell.unit].name
        if name == STEP_NAME:
            found: FloatArray = velocity[source] - velocity[cell.step]
            return found
        lag = cell.step - source
        measured = stats.deltas[prompt, cell.step, group_of[name], lag - 1]
        return np.asarray(measured, dtype=np.float64)

    constant = np.zeros((stats.num_steps, velocity.shape[1]))
    rows, own = [], []
    for cell in cells:
        reuse = dsigma[cell.step] * delta(cell, cell.anchor)
        constant[cell.step] += reuse
        if cell.base >= 0:
            reach = (sigmas[cell.step] - sigmas[cell.anchor]) / (
                sigmas[cell.anchor] - sigmas[cell.base]
            )
            rows.append(reach * (reuse - dsigma[cell.step] * delta(cell, cell.base)))
            own.append(reuse)
    for _, step, previous in moves:
        rows.append(dsigma[step] * (velocity[step] - velocity[previous]))
        own.append(np.zeros(velocity.shape[1]))
    shape = (len(rows), velocity.shape[1])
    return constant, np.reshape(rows, shape), np.reshape(own, shape)


def _inner_products(
    constant: FloatArray, rows: FloatArray, own: FloatArray, at: IntArray, weight: FloatArray
) -> tuple[float, FloatArray, FloatArray, FloatArray, FloatArray]:
    """What `AffineError` keeps of one prompt; the product of errors made at s and t is weighted."""
    steps = np.arange(len(weight))

    def later(first: IntArray, second: IntArray) -> FloatArray:
        found: FloatArray = weight[np.maximum(first[:, None], second)]
        return found

    scale = weight[at]
    inner: FloatArray = scale * (own * rows).sum(axis=1)
    norm: FloatArray = scale * (rows**2).sum(axis=1)
    total = float((constant @ constant.T * later(steps, steps)).sum())
    linear: FloatArray = (rows @ constant.T * later(at, steps)).sum(axis=1)
    return total, linear, rows @ rows.T * later(at, at), inner, norm
