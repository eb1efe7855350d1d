"""The non-stationary solver: exact where it must be, better than its prior where it can be."""

from __future__ import annotations

import numpy as np
import torch

from bench.peers.nonstationary import (
    NonStationary,
    default_row,
    fit_nonstationary,
    fit_row,
)
from layercache.evaluation._latency import run_once
from layercache.evaluation._trajectories import collect_trajectories
from layercache.evaluation.methods import Uncached
from layercache.evaluation.peers import Uniform
from tests.evaluation.test_peers import counted, work
from tests.tiny import tiny_pipeline

STEPS = 6


def test_all_nodes_with_the_default_rows_are_adams_bashforth() -> None:
    sigmas = np.linspace(1, 0, 5)
    first = default_row(None, (0, 1), 1, sigmas)
    assert first.tolist() == [1.0, -0.25]
    second = default_row(first.tolist(), (0, 1), 2, sigmas)
    # x_1 + h (3/2 v_1 - 1/2 v_0) with h = -1/4
    np.testing.assert_allclose(second, [1.0, -0.25 + 0.125, -0.375])


def test_every_node_computed_is_the_uncached_run() -> None:
    pipe = tiny_pipeline()
    (batch,) = work()
    plain = run_once(pipe, Uncached(), batch).images
    trajectories = collect_trajectories(pipe, [batch])
    solver = fit_nonstationary(pipe, batch, trajectories, range(STEPS))
    assert solver.compute_share == 1.0
    torch.testing.assert_close(run_once(pipe, solver, batch).images, plain, atol=2e-4, rtol=0)


def test_a_fit_computes_at_its_nodes_only_and_leaves_no_trace() -> None:
    pipe = tiny_pipeline()
    (batch,) = work()
    solver = fit_nonstationary(pipe, batch, collect_trajectories(pipe, [batch]), (0, 1, 4))
    assert [len(row) for row in solver.rows] == [2, 3, 4]
    assert solver.fresh == (True, True, False, False, True, False)
    calls = counted(pipe)
    run_once(pipe, solver, batch)
    assert calls[0] == 3 * 2
    assert "step" not in vars(pipe.scheduler)


def test_a_fit_beats_reuse_and_its_own_prior_on_prompts_that_it_has_not_seen() -> None:
    pipe = tiny_pipeline()
    seen, unseen = work(3)
    nodes = (0, 1, 3)
    trajectories = collect_trajectories(pipe, [seen])
    fitted = fit_nonstationary(pipe, seen, trajectories, nodes)
    rows: list[tuple[float, ...]] = []
    for stop in (*nodes[1:], STEPS):
        before = rows[-1] if rows else None
        rows.append(tuple(default_row(before, nodes, stop, trajectories.sigmas).tolist()))
    prior = NonStationary(nodes, tuple(rows), fitted.sigmas)
    plain = run_once(pipe, Uncached(), unseen).images

    def error(method: object) -> float:
        images = run_once(pipe, method, unseen).images  # type: ignore[arg-type]
        return float((images - plain).pow(2).mean())

    assert error(fitted) < 0.5 * error(prior)
    assert error(fitted) < 0.5 * error(Uniform(fitted.fresh))


def test_a_row_finds_the_coefficients_that_made_the_data() -> None:
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(4, 5, 200))
    truth = np.array([1.0, -0.3, 0.2, 0.5, -0.7])
    target = np.einsum("k,pkn->pn", truth, basis)
    np.testing.assert_allclose(fit_row(basis, target, np.zeros(5)), truth, atol=1e-6)


def test_a_row_stays_at_its_prior_where_prompts_have_nothing_in_common() -> None:
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(4, 3, 400))
    prior = np.array([1.0, 0.5, -0.2])
    noise = np.stack([sign * basis[p, 1] for p, sign in enumerate((1, -1, 1, -1))])
    target = np.einsum("k,pkn->pn", prior, basis) + noise
    fitted = fit_row(basis, target, prior)
    # What helps two prompts harms the other two: nothing is gained on one that is left out.
    np.testing.assert_allclose(fitted, prior, atol=0.1)


def test_a_second_generation_starts_anew() -> None:
    pipe = tiny_pipeline()
    first, second = work(3)
    solver = fit_nonstationary(pipe, first, collect_trajectories(pipe, [first]), (0, 2, 4))
    with torch.no_grad(), solver.attach(pipe):
        from layercache.models.pipelines import run_pipeline

        run_pipeline(pipe, first.arguments)
        shared = run_pipeline(pipe, second.arguments)
    assert torch.equal(shared, run_once(pipe, solver, second).images)
