"""Schedules of the re-implemented rivals against brute force over every schedule."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bench.peers.dpcache import key_steps, step_errors
from bench.peers.lemica import final_errors, minimax_steps
from bench.peers.nodes import NodeSearch
from layercache.errors import BudgetError
from layercache.evaluation._trajectories import Trajectories

STEPS = 8


def schedules(steps: int, budget: int) -> list[tuple[int, ...]]:
    return [(0, *rest) for rest in itertools.combinations(range(1, steps), budget - 1)]


def price(errors: np.ndarray, keys: tuple[int, ...], power: float) -> float:
    """Σ error^power over the steps that are not keys, each predicted from the two keys before."""
    total = 0.0
    for step in range(errors.shape[1]):
        before = [key for key in keys if key < step]
        if step not in keys:
            base = before[-2] if len(before) > 1 else -1
            total += errors[base + 1, before[-1], step] ** power
    return total


@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_key_steps_are_as_good_as_brute_force(power: float, seed: int) -> None:
    errors = np.random.default_rng(seed).random((STEPS + 1, STEPS, STEPS))
    for j in range(STEPS):
        errors[:, j, : j + 1] = errors[j + 1 :, j] = 0.0
    for budget in range(1, STEPS + 1):
        keys = key_steps(errors, budget, power)
        assert len(keys) == budget and keys[0] == 0 and list(keys) == sorted(set(keys))
        best = min(price(errors, other, power) for other in schedules(STEPS, budget))
        assert price(errors, keys, power) == pytest.approx(best)


@pytest.mark.parametrize("budget", [0, STEPS + 1])
def test_an_impossible_number_of_key_steps_is_an_error(budget: int) -> None:
    with pytest.raises(BudgetError, match=f"1 to {STEPS} computed steps, not {budget}"):
        key_steps(np.zeros((STEPS + 1, STEPS, STEPS)), budget)


def trajectories(steps: int = STEPS, slope: float = 0.0, wave: float = 1.0) -> Trajectories:
    """Euler trajectories of a velocity linear in sigma, plus a wave, for two prompts."""
    sigmas = np.linspace(1.0, 0.0, steps + 1)
    rng = np.random.default_rng(0)
    base, direction, other = rng.normal(size=(3, 2, 5))
    phase = wave * np.sin(7 * sigmas[:-1])
    velocities = (
        base[:, None]
        + slope * sigmas[None, :-1, None] * direction[:, None]
        + phase[None, :, None] * other[:, None]
    )
    latents = np.repeat(rng.normal(size=(2, 1, 5)), steps + 1, axis=1)
    latents[:, 1:] += np.cumsum(np.diff(sigmas)[None, :, None] * velocities, axis=1)
    return Trajectories(sigmas, latents.astype(np.float32), velocities.astype(np.float32))


def test_a_velocity_linear_in_sigma_is_predicted_without_error() -> None:
    errors = step_errors(trajectories(slope=3.0, wave=0.0), "sigma")
    assert errors[2 + 1, 3, 4:].max() < 1e-6, "two keys give a line"
    assert errors[0, 3, 4:].min() > 1e-3, "one key only repeats"


def test_step_errors_are_those_of_the_prediction() -> None:
    tr = trajectories(slope=1.0)
    errors = step_errors(tr, "sigma")
    v, s = tr.velocities.astype(np.float64), tr.sigmas
    i, j, t = 1, 3, 6
    predicted = v[:, j] + (s[t] - s[j]) / (s[j] - s[i]) * (v[:, j] - v[:, i])
    size = np.sqrt(((predicted - v[:, t]) ** 2).mean(-1)).mean() * abs(s[t + 1] - s[t])
    assert errors[i + 1, j, t] == pytest.approx(size, rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_minimax_steps_are_as_good_as_brute_force(seed: int) -> None:
    costs = np.full((STEPS, STEPS + 1), np.inf)
    rng = np.random.default_rng(seed)
    for t in range(STEPS):
        # Few different values, so that the sum has ties to break.
        costs[t, t + 1 :] = rng.integers(1, 5, STEPS - t)
        costs[t, t + 1] = 0

    def weights(keys: tuple[int, ...]) -> tuple[float, float]:
        edges = [costs[a, b] for a, b in itertools.pairwise((*keys, STEPS))]
        return max(edges), sum(edges)

    for budget in range(1, STEPS + 1):
        fresh = minimax_steps(costs, budget)
        keys = tuple(step for step, computed in enumerate(fresh) if computed)
        assert keys[0] == 0 and len(keys) <= budget
        fewer = [k for count in range(1, budget + 1) for k in schedules(STEPS, count)]
        assert weights(keys) == min(map(weights, fewer))


def test_no_computed_step_at_all_is_an_error() -> None:
    with pytest.raises(BudgetError, match="at least 1 computed step of 8, not 0"):
        minimax_steps(np.zeros((STEPS, STEPS + 1)), 0)


def test_final_errors_grow_with_the_stretch_and_with_amplification() -> None:
    tr = trajectories(slope=2.0)
    flat = final_errors(tr, np.ones(STEPS))
    assert np.isinf(flat[3, :4]).all() and flat[3, 4] == 0
    displaced = (tr.sigmas[6] - tr.sigmas[3]) * tr.velocities[:, 3].astype(np.float64)
    error = displaced - (tr.latents[:, 6] - tr.latents[:, 3])
    expected = np.exp(np.log(np.sqrt((error**2).mean(-1))).mean())
    assert flat[3, 6] == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(final_errors(tr, np.full(STEPS, 3.0))[3, 5:], 3 * flat[3, 5:])


def test_node_search_keeps_the_number_of_nodes_and_never_makes_them_worse() -> None:
    search = NodeSearch(trajectories(16), np.linspace(4, 1, 16))
    start = tuple(range(0, 16, 2))
    found = search.climb(start)
    assert len(found) == len(set(found)) == len(start) and found[0] == 0 and max(found) < 16
    assert search.score(found) <= search.score(start)
    assert search.best([start, found]) == found


def test_node_search_computes_where_the_velocity_turns() -> None:
    """Half of the trajectory is straight: nodes go to the other half."""
    steps = 20
    sigmas = np.linspace(1.0, 0.0, steps + 1)
    rng = np.random.default_rng(1)
    v = np.repeat(rng.normal(size=(2, 1, 6)), steps, axis=1)
    v[:, steps // 2 :] += rng.normal(size=(2, steps // 2, 6))
    latents = np.repeat(rng.normal(size=(2, 1, 6)), steps + 1, axis=1)
    latents[:, 1:] += np.cumsum(np.diff(sigmas)[None, :, None] * v, axis=1)
    search = NodeSearch(
        Trajectories(sigmas, latents.astype(np.float32), v.astype(np.float32)), np.ones(steps)
    )
    found = search.climb(tuple(range(0, steps, 2)))
    assert sum(node >= steps // 2 for node in found) > sum(node < steps // 2 for node in found)
