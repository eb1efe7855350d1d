"""Gains: the affine error, the least-squares optimum, leave-one-prompt-out and the guard."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from layercache.errors import LayerCacheError
from layercache.solver import SOLVERS, ScheduleProblem, UnitSchedule
from layercache.solver.gains import RIDGES, fit_gains, predicted_psnr, trajectory_error
from layercache.solver.pricing import price_units
from layercache.stats import CalibrationStats
from tests.solver.strategies import random_stats


def solve(
    stats: CalibrationStats, share: float = 0.5, units: tuple[str, ...] = ("step", "groups")
) -> tuple[UnitSchedule, ...]:
    priced = price_units(stats, units)
    problem = ScheduleProblem(
        sigmas=stats.sigmas,
        units=tuple(unit.costs for unit in priced),
        budget_ms=0.0,
        fixed_ms=0.0 if "step" in units else stats.num_steps * stats.rest_ms,
    )
    full = stats.num_steps * (float(stats.group_ms.sum()) + stats.rest_ms)
    return SOLVERS["dp"](problem.with_budget(share * full)).units


def direct_error(
    stats: CalibrationStats, schedules: tuple[UnitSchedule, ...], gains: tuple[np.ndarray, ...]
) -> np.ndarray:
    """The final error, vector by vector. Oracle of everything that goes through inner products.

    Each pair of steps counts with the growth since the later one.
    """
    sigma = stats.sigmas.astype(float)
    names = [group.name for group in stats.groups]
    total = np.zeros((stats.num_steps, stats.num_prompts, stats.velocities.shape[2]))
    for row, gain in zip(schedules, gains, strict=True):
        for t in range(stats.num_steps):
            dt = sigma[t + 1] - sigma[t]

            def delta(s: int, t: int = t, row: UnitSchedule = row) -> np.ndarray:
                if row.name == "step":
                    moved: np.ndarray = (stats.velocities[:, s] - stats.velocities[:, t]).astype(
                        float
                    )
                    return moved
                return stats.deltas[:, t, names.index(row.name), t - s - 1].astype(float)

            a, b = int(row.anchor[t]), int(row.base[t])
            if a >= 0:
                total[t] += dt * delta(a)
                if b >= 0:
                    rise = (sigma[t] - sigma[a]) / (sigma[a] - sigma[b])
                    total[t] += dt * gain[t] * rise * (delta(a) - delta(b))
            elif row.refresh[t] and t > 0 and gain[t]:
                previous = int(np.flatnonzero(row.refresh[:t])[-1])
                total[t] -= dt * gain[t] * delta(previous)
    later = np.maximum(*np.indices((stats.num_steps, stats.num_steps)))
    products = np.einsum("spi,tpi->pst", total, total)
    squared: np.ndarray = (products * stats.propagation[later] ** 2).sum(axis=(1, 2))
    return squared / stats.numel


@pytest.mark.parametrize("mode", ["none", "unit", "cell", "trajectory"])
@pytest.mark.parametrize("units", [("step",), ("groups",), ("step", "groups")])
def test_the_affine_error_is_the_direct_one(mode: str, units: tuple[str, ...]) -> None:
    stats = random_stats(1)
    schedules = solve(stats, units=units)
    fit = fit_gains(stats, schedules, mode)
    error = trajectory_error(stats, schedules, fit.gains)
    assert error == pytest.approx(direct_error(stats, schedules, fit.gains), rel=1e-4)


def test_trajectory_gains_are_stationary() -> None:
    """Oracle: finite differences of the ridge objective around the fitted gains."""
    stats = random_stats(2, prompts=6)
    schedules = solve(stats)
    fit = fit_gains(stats, schedules)
    assert fit.mode == "trajectory"
    assert fit.ridge in RIDGES
    start = fit_gains(stats, schedules, "cell").gains

    def objective(gains: list[np.ndarray]) -> float:
        value = float(trajectory_error(stats, schedules, gains).sum()) * stats.numel
        for row, (mine, own) in enumerate(zip(gains, start, strict=True)):
            for t in np.flatnonzero(np.array(fit.gains[row]) != 0):
                one = [np.zeros_like(g) for g in gains]
                two = [np.zeros_like(g) for g in gains]
                one[row][t], two[row][t] = 1.0, 2.0
                # ||A_k||^2 from the second difference of the error along one gain.
                values = [
                    trajectory_error(stats, schedules, g).sum()
                    for g in ([np.zeros_like(g) for g in gains], one, two)
                ]
                weight = (values[0] - 2 * values[1] + values[2]) / 2 * stats.numel
                value += (fit.ridge or 0) * weight * float(mine[t] - own[t]) ** 2
        return value

    best = objective([np.array(g) for g in fit.gains])
    rng = np.random.default_rng(0)
    for _ in range(6):
        moved = [np.where(g != 0, g + 0.02 * rng.standard_normal(len(g)), 0.0) for g in fit.gains]
        assert objective(moved) >= best * (1 - 1e-6)


def test_trajectory_gains_win_on_coherent_errors() -> None:
    stats = random_stats(3, prompts=8)
    schedules = solve(stats, 0.5, ("step",))
    scores = {mode: fit_gains(stats, schedules, mode).score for mode in ("none", "unit", "cell")}
    trajectory = fit_gains(stats, schedules, "trajectory")
    assert trajectory.mode == "trajectory"
    assert trajectory.score < min(scores.values())
    assert "dB over per-cell on prompts left out" in trajectory.note


def test_the_guard_falls_back_to_per_cell_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a ridge, more gains than numbers: exact on two prompts, useless for a third."""
    monkeypatch.setattr("layercache.solver.gains.RIDGES", (1e-9,))
    rng = np.random.default_rng(0)
    stats = random_stats(4, prompts=3, size=4)
    velocities = rng.standard_normal(stats.velocities.shape).astype(np.float32)
    noisy = replace(stats, velocities=velocities, amplification=np.ones((3, stats.num_steps)))
    schedules = solve(noisy, 0.5, ("step",))
    fit = fit_gains(noisy, schedules)
    assert fit.mode == "cell"
    assert fit.ridge is None
    assert "trajectory gains were predicted to lose" in fit.note
    own = fit_gains(noisy, schedules, "cell")
    assert all((a == b).all() for a, b in zip(fit.gains, own.gains, strict=True))


def test_one_prompt_cannot_check_trajectory_gains() -> None:
    stats = random_stats(5, prompts=1)
    fit = fit_gains(stats, solve(stats))
    assert fit.mode == "cell"
    assert "need two prompts or more" in fit.note


def test_leave_one_out_uses_no_gain_fitted_on_the_prompt_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Growth is a mean over prompts, so it would differ without one of them.
    stats = replace(random_stats(6, prompts=4), amplification=np.ones((4, 12)))
    schedules = solve(stats)
    fit = fit_gains(stats, schedules)
    assert fit.ridge is not None
    # The same ridge on the others alone, by a grid of one.
    monkeypatch.setattr("layercache.solver.gains.RIDGES", (fit.ridge,))
    compared = 0
    for left_out in range(4):
        rest = stats.select([p for p in range(4) if p != left_out])
        other = fit_gains(rest, schedules)
        if other.mode == "trajectory":
            error = trajectory_error(stats.select([left_out]), schedules, other.gains)
            assert error[0] == pytest.approx(fit.loo_error[left_out], rel=1e-3)
            compared += 1
    assert compared


def test_full_compute_has_no_gains_and_no_error() -> None:
    stats = random_stats(7)
    schedules = solve(stats, 1.0, ("step", "groups"))
    everything = tuple(
        UnitSchedule(
            name=row.name,
            refresh=np.ones(stats.num_steps, dtype=bool),
            anchor=np.full(stats.num_steps, -1),
            base=np.full(stats.num_steps, -1),
        )
        for row in schedules
    )
    fit = fit_gains(stats, everything)
    assert all(not gains.any() for gains in fit.gains)
    error = trajectory_error(stats, everything, fit.gains)
    assert (error == 0).all()
    assert np.isinf(predicted_psnr(stats, error)).all()


def test_corrections_stand_only_at_run_steps_and_can_be_left_out() -> None:
    stats = random_stats(8, prompts=6)
    schedules = solve(stats, 0.5, ("step",))
    row = schedules[0]
    gains = fit_gains(stats, schedules).gains[0]
    assert gains[0] == 0
    assert gains[row.refresh][1:].any()
    without = fit_gains(stats, schedules, corrections=False).gains[0]
    assert not without[row.refresh].any()


def test_gains_are_rounded_as_plan_files_are() -> None:
    stats = random_stats(9)
    for gains in fit_gains(stats, solve(stats)).gains:
        assert (np.round(gains, 6) == gains).all()


def test_unknown_modes_are_refused() -> None:
    stats = random_stats(0)
    with pytest.raises(LayerCacheError) as error:
        fit_gains(stats, solve(stats), "best")
    assert str(error.value) == "gains is 'best'; use 'none', 'unit', 'cell' or 'trajectory'"
