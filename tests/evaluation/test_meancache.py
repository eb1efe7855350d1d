"""MeanCache: its path against brute force, its steps against the formulas on a known field."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from layercache.errors import BudgetError
from layercache.evaluation._trajectories import Trajectories
from layercache.evaluation.peers.meancache import (
    Edge,
    MeanCache,
    candidate_schedules,
    edge_costs,
    mean_cache_schedules,
    shortest_path,
)


def brute_force(costs: np.ndarray, budget: int, gamma: float) -> float:
    """The least Σ cost^γ over every way to place at most `budget` edges."""
    steps = len(costs)
    best = np.inf
    for count in range(1, budget + 1):
        for inner in itertools.combinations(range(1, steps), count - 1):
            nodes = (0, *inner, steps)
            price = sum(costs[a, b].min() ** gamma for a, b in itertools.pairwise(nodes))
            best = min(best, price)
    return float(best)


def random_costs(steps: int, seed: int) -> np.ndarray:
    costs = np.full((steps, steps + 1, 3), np.inf)
    rng = np.random.default_rng(seed)
    for start in range(steps):
        for k in range(min(3, start + 1)):
            costs[start, start + 1 :, k] = rng.random(steps - start)
    return costs


def price_of(path: tuple[Edge, ...], costs: np.ndarray, gamma: float) -> float:
    return float(sum(costs[e.start, e.stop, e.k - 1] ** gamma for e in path))


@pytest.mark.parametrize("gamma", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("seed", range(5))
def test_path_is_as_good_as_brute_force(gamma: float, seed: int) -> None:
    costs = random_costs(8, seed)
    for budget in (1, 2, 4, 8):
        path = shortest_path(costs, budget, gamma)
        assert price_of(path, costs, gamma) == pytest.approx(brute_force(costs, budget, gamma))
        assert len(path) <= budget
        assert [e.start for e in path] == [0, *(e.stop for e in path[:-1])]
        assert path[-1].stop == 8


def test_a_budget_of_no_steps_is_an_error() -> None:
    with pytest.raises(BudgetError, match="at least 1 fresh step of 4, not 0"):
        shortest_path(random_costs(4, 0), 0)


def field(kind: str, steps: int = 10) -> Trajectories:
    """Euler trajectories of dz/dσ = 1 + σ ("linear") or of a wavy field, two prompts."""
    sigmas = np.linspace(1.0, 0.0, steps + 1)
    z = np.zeros((2, steps + 1, 3), dtype=np.float64)
    z[:, 0] = [[0.3, -0.2, 0.1], [1.0, 0.5, -0.4]]
    v = np.zeros((2, steps, 3))
    for t in range(steps):
        slope = 1 + sigmas[t] if kind == "linear" else np.sin(9 * sigmas[t]) + z[:, t]
        v[:, t] = slope
        z[:, t + 1] = z[:, t] + (sigmas[t + 1] - sigmas[t]) * v[:, t]
    return Trajectories(sigmas, z.astype(np.float32), v.astype(np.float32))


def test_an_edge_of_one_step_costs_nothing() -> None:
    costs = edge_costs(field("wavy"))
    for t in range(10):
        assert costs[t, t + 1, 0] == pytest.approx(0, abs=1e-6)


def test_costs_are_infinite_backwards_and_before_the_first_step() -> None:
    costs = edge_costs(field("wavy"))
    assert np.isinf(costs[3, :4]).all()
    assert np.isinf(costs[0, 1:, 1:]).all()
    assert np.isfinite(costs[3, 4:, :4]).all()


def test_a_velocity_linear_in_sigma_is_predicted_exactly_when_k_is_the_edges_length() -> None:
    costs = edge_costs(field("linear"))
    for length in (2, 3, 4):
        assert costs[5, 5 + length, length - 1] == pytest.approx(0, abs=1e-6)
        assert costs[5, 5 + length, 0] > 0.04


def test_schedules_fit_the_budget_and_differ() -> None:
    schedules = mean_cache_schedules(field("wavy"), 4)
    assert all(len(path) <= 4 and path[-1].stop == 10 for path in schedules)
    assert len(set(schedules)) == len(schedules) >= 1


def simulate(method: MeanCache, tr: Trajectories, kind: str) -> np.ndarray:
    """Drive the method's own step function through the field, as the runner would."""
    advance = method._new_run()
    z = torch.tensor(tr.latents[:, 0], dtype=torch.float64)
    stale = torch.zeros_like(z)
    for t, fresh in enumerate(method.fresh):
        sigma = tr.sigmas[t]
        if fresh:
            stale = (1 + sigma) * torch.ones_like(z) if kind == "linear" else np.sin(9 * sigma) + z
        z = z + (tr.sigmas[t + 1] - sigma) * advance(t, stale, z)
    return z.numpy()


def test_all_steps_fresh_is_the_plain_trajectory() -> None:
    tr = field("wavy")
    edges = tuple(Edge(t, t + 1, 1) for t in range(10))
    method = MeanCache(edges, tuple(tr.sigmas.tolist()))
    assert method.compute_share == 1.0
    np.testing.assert_allclose(simulate(method, tr, "wavy"), tr.latents[:, -1], atol=1e-5)


def test_an_edge_is_walked_with_its_mean_velocity() -> None:
    tr = field("linear")
    edges = (*(Edge(t, t + 1, 1) for t in range(5)), Edge(5, 10, 2))
    method = MeanCache(edges, tuple(tr.sigmas.tolist()))
    s, z, v = tr.sigmas, tr.latents.astype(np.float64), tr.velocities.astype(np.float64)
    # K = 2: from step 4 to the latent that follows step 5.
    jvp = (z[:, 6] - z[:, 4] - (s[6] - s[4]) * v[:, 4]) / (s[6] - s[4]) ** 2
    mean = v[:, 5] + (s[10] - s[5]) * jvp
    expected = z[:, 5] + (s[10] - s[5]) * mean
    np.testing.assert_allclose(simulate(method, tr, "linear"), expected, atol=1e-5)


def test_span_one_is_plain_reuse() -> None:
    tr = field("linear", steps=4)
    result = simulate(MeanCache((Edge(0, 4, 1),), tuple(tr.sigmas.tolist())), tr, "linear")
    np.testing.assert_allclose(result, tr.latents[:, 0] - tr.velocities[:, 0], atol=1e-5)


def test_a_base_that_was_skipped_has_the_velocity_used_there() -> None:
    tr = field("linear", steps=6)
    method = MeanCache((Edge(0, 1, 1), Edge(1, 3, 2), Edge(3, 6, 2)), tuple(tr.sigmas.tolist()))
    s, z, v = tr.sigmas, tr.latents.astype(np.float64), tr.velocities.astype(np.float64)

    def mean(v_t: np.ndarray, v_r: np.ndarray, t: int, stop: int) -> np.ndarray:
        d_r, d_t = s[t] - s[t - 1], s[t + 1] - s[t]
        jvp = (d_r * v_r + d_t * v_t - (d_r + d_t) * v_r) / (d_r + d_t) ** 2
        return v_t + (s[stop] - s[t]) * jvp

    first = mean(v[:, 1], v[:, 0], 1, 3)
    second = mean(v[:, 3], first, 3, 6)  # step 2 was skipped: its velocity is the edge's
    expected = z[:, 1] + (s[3] - s[1]) * first + (s[6] - s[3]) * second
    np.testing.assert_allclose(simulate(method, tr, "linear"), expected, atol=1e-5)


def test_one_candidate_only_reuses_and_none_stands_twice() -> None:
    found = candidate_schedules(field("wavy"), 4, 2)
    assert 2 <= len(found) <= 3 and len(set(found)) == len(found)
    assert all(edge.k == 1 for edge in found[-1])
    assert found[0] == mean_cache_schedules(field("wavy"), 4)[0]
