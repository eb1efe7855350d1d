"""The error of a plan by the recursion of the error model, for `verify`: plain and apart from it.

`prediction/error.py` states the recursion, and `prediction/_responses.py` what cached groups do to
one another. Here every vector is formed and every sum written out, one prompt at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from layercache._plan_rows import UnitPlan
from layercache.stats import CalibrationStats, FloatArray

PREDICTED = "123456789abcdefghijklmnopqrstuvwxyz"


class Row:
    """One unit's cells: for each step whether it is computed, its anchor, and what it reads."""

    def __init__(self, stats: CalibrationStats, unit: UnitPlan) -> None:
        names = [group.name for group in stats.groups]
        self.unit, self.name = unit, unit.name
        self.group = None if unit.kind == "step" else names.index(unit.name)
        self.computed = [symbol == "#" for symbol in unit.cells]
        self.cached = [symbol == "0" or symbol in PREDICTED for symbol in unit.cells]
        self.anchor: list[int | None] = []
        self.reads: list[dict[int, float]] = []
        sigma = [float(s) for s in stats.sigmas]
        for step, symbol in enumerate(unit.cells):
            before = [s for s in range(step) if self.computed[s]][::-1]
            self.anchor.append(before[0] if self.cached[step] else None)
            taps = () if unit.taps is None else unit.taps[step]
            # A group's anchor is not among what its taps count, a computed step not itself.
            counted = before if self.group is None else before[1:]
            reads = {counted[h]: b for h, b in enumerate(taps) if b != 0}
            if self.group is not None and symbol in PREDICTED and not taps:
                anchor = before[0]
                base = anchor - 1 - PREDICTED.index(symbol)
                reads = {base: (sigma[step] - sigma[anchor]) / (sigma[anchor] - sigma[base])}
            self.reads.append(reads)


def foretold(stats: CalibrationStats, rows: Sequence[Row], prompt: int) -> float:
    """Geometric mean of the final errors with all growth along, and with all of it turned."""
    both = [_final_error(stats, rows, prompt, turns=turns) for turns in (False, True)]
    return math.sqrt(both[0] * both[1])


def _final_error(
    stats: CalibrationStats, rows: Sequence[Row], prompt: int, *, turns: bool
) -> float:
    """Squared error per element of the final latent: ||S||^2 + D, what grows in S turned or not."""
    sigma, growth = [float(s) for s in stats.sigmas], growths(stats)
    velocity = stats.velocities[prompt].astype(np.float64)
    latent = stats.latents[prompt].astype(np.float64)
    euler, steps = _is_euler(stats), stats.num_steps
    rate = max(1.0, math.log(growth[0] / growth[-1]) / (sigma[0] - sigma[-1]))
    runs = [step for step, run in enumerate(rows[0].computed) if run]
    error: FloatArray = np.zeros(velocity.shape[1])
    drift, moved = 0.0, stats.passes > 1
    used: dict[int, FloatArray] = {}
    unsure: dict[int, float] = {}
    changed: dict[tuple[int, int], FloatArray] = {}
    arrived: dict[int, tuple[FloatArray, float]] = {}
    for start, stop in zip(runs, [*runs[1:], steps], strict=True):
        cached = [row for row in rows[1:] if row.cached[start]]
        used[start], unsure[start] = velocity[start], 0.0
        if cached:
            change, unsure[start] = _changes(stats, cached, start, prompt, changed)
            used[start] = velocity[start] + change
        arrived[start] = error, drift
        length, grown = sigma[stop] - sigma[start], growth[start] / growth[stop]
        moved = moved or stop > start + 1 or (euler and bool(cached))
        reads = rows[0].reads[start]
        mean = (1 + sum(reads.values())) * used[start]
        for source, tap in reads.items():
            mean = mean - tap * used[source]
        if euler:
            path = sum((sigma[t + 1] - sigma[t]) * velocity[t] for t in range(start, stop))
        else:
            path = latent[stop] - latent[start]
        before = error
        error = before if turns else grown * before
        error = error + length * mean - (path if moved else length * velocity[start])
        variance = (length * (1 + sum(reads.values()))) ** 2 * unsure[start]
        for source, tap in reads.items():
            other, off = arrived[source]
            apart = float((before - other) @ (before - other)) + drift + off
            variance += (length * tap) ** 2 * (rate**2 * apart + unsure[source])
        turned = (grown**2 - 1) * float(before @ before) if turns else 0.0
        drift = grown**2 * drift + turned + variance
    return float((error @ error + drift) * growth[-1] ** 2 / stats.numel)


def growths(stats: CalibrationStats) -> list[float]:
    """Geometric mean amplification of each step, never below that of a later one; then the last."""
    found: list[float] = []
    for step in reversed(range(stats.num_steps)):
        logs = [math.log(float(row[step])) for row in stats.amplification]
        found.append(max(math.exp(sum(logs) / len(logs)), found[-1] if found else 0.0))
    return [*found[::-1], found[0]]


def _shares(row: Row, step: int) -> dict[int, float]:
    """The c of a cached cell of a group, by the step whose residual it is of; they add up to 1."""
    anchor, reads = row.anchor[step], row.reads[step]
    assert anchor is not None
    return {anchor: 1 + sum(reads.values())} | {source: -b for source, b in reads.items()}


def _delta(stats: CalibrationStats, row: Row, step: int, prompt: int) -> FloatArray:
    """(S,) what a cached cell of a group moves the velocity by, alone: c D added up."""
    measured = stats.deltas[prompt, step, row.group]
    total: FloatArray = np.zeros(measured.shape[1])
    for source, share in _shares(row, step).items():
        total = total + share * measured[step - source - 1].astype(np.float64)
    return total


def _answer(stats: CalibrationStats, earlier: int, later: int, sigma: float) -> tuple[float, float]:
    """How much of a group's change a later group answers along it, and squared, across it."""
    couple = [(h, g) for h in range(stats.num_groups) for g in range(h + 1, stats.num_groups)]
    known, along, across = [], [], []
    for k, level in enumerate(stats.response_sigmas):
        inner, answer, change = stats.responses[:, k, couple.index((earlier, later))].sum(axis=0)
        if change > 0:
            known.append(-float(level))
            along.append(inner / change)
            across.append(max(answer / change - (inner / change) ** 2, 0.0))
    if not known:
        return 0.0, 0.0
    return float(np.interp(-sigma, known, along)), float(np.interp(-sigma, known, across))


def _changes(
    stats: CalibrationStats,
    cached: Sequence[Row],
    step: int,
    prompt: int,
    before: dict[tuple[int, int], FloatArray],
) -> tuple[FloatArray, float]:
    """What the groups that are cached at a step move its velocity by together, and the variance.

    `before` has what each did at earlier steps, and gets what it does here.
    """
    deltas = [_delta(stats, row, step, prompt) for row in cached]
    total: FloatArray = np.sum(deltas, axis=0)
    sizes = [float(np.sqrt(delta @ delta)) for delta in deltas]
    if stats.mode != "replay":
        return 0 * total, sum(sizes) ** 2
    if not len(stats.response_sigmas):
        return total, sum(sizes) ** 2 - sum(size**2 for size in sizes)
    nothing, variance = 0 * total, 0.0
    for row, delta in zip(cached, deltas, strict=True):
        assert row.group is not None
        moved = delta
        for earlier in range(row.group):
            apart = -before.get((step, earlier), nothing)
            for source, share in _shares(row, step).items():
                apart = apart + share * before.get((source, earlier), nothing)
            along, across = _answer(stats, earlier, row.group, float(stats.sigmas[step]))
            moved = moved + along * apart
            variance += across * float(apart @ apart)
        before[step, row.group] = moved
    return np.sum([before[step, row.group] for row in cached if row.group is not None], 0), variance


def _is_euler(stats: CalibrationStats) -> bool:
    name = stats.setting.get("scheduler")
    if isinstance(name, str):
        return "Euler" in name
    for step in range(stats.num_steps):
        length = float(stats.sigmas[step + 1] - stats.sigmas[step])
        moved = stats.latents[:, step + 1].astype(np.float64) - stats.latents[:, step]
        if np.abs(moved - length * stats.velocities[:, step]).max() > 1e-3 * np.abs(moved).max():
            return False
    return True
