"""Peers and the runner on a tiny random pipeline: what is computed, what is left behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from layercache.calibration.prompts import Batch, batches
from layercache.errors import ModelMismatchError
from layercache.evaluation._contenders import Contenders
from layercache.evaluation._latency import run_once, time_interleaved
from layercache.evaluation._trajectories import collect_trajectories
from layercache.evaluation.methods import Uncached
from layercache.evaluation.peers import FewerSteps, MeanCache, Uniform, mean_cache_schedules
from layercache.evaluation.peers.meancache import Edge
from layercache.evaluation.peers.skipping import skip_steps
from layercache.evaluation.peers.uniform import uniform_steps
from layercache.models.pipelines import run_pipeline
from tests.prediction.strategies import random_stats
from tests.tiny import tiny_arguments, tiny_pipeline

STEPS = 6


def work(count: int = 2, steps: int = STEPS) -> list[Batch]:
    captions = ["a red circle", "a large blue square left", "a green star on a black background"]
    return batches(captions[:count], 0, 2, tiny_arguments() | {"num_inference_steps": steps})


def counted(pipe: Any) -> list[int]:
    """Count the transformer's real computations through its first block."""
    calls = [0]
    pipe.transformer.transformer_blocks[0].register_forward_hook(
        lambda *_: calls.__setitem__(0, calls[0] + 1)
    )
    return calls


@pytest.mark.parametrize("steps,budget", [(6, 3), (7, 3), (50, 16), (50, 36), (5, 5), (9, 1)])
def test_uniform_steps_are_as_many_as_the_budget_and_even(steps: int, budget: int) -> None:
    fresh = uniform_steps(steps, budget)
    positions = [i for i, value in enumerate(fresh) if value]
    assert len(positions) == budget and positions[0] == 0
    gaps = np.diff([*positions, steps])
    assert gaps.max() - gaps.min() <= 1


def test_uniform_steps_refuse_an_impossible_budget() -> None:
    with pytest.raises(ValueError, match="budget=7 fresh steps of 6: 1 to 6 are possible"):
        uniform_steps(6, 7)


def test_every_step_fresh_gives_identical_images() -> None:
    pipe = tiny_pipeline()
    (batch,) = work()
    plain = run_once(pipe, Uncached(), batch).images
    method = Uniform((True,) * STEPS)
    same = run_once(pipe, method, batch).images
    assert torch.equal(plain, same)


def test_skipped_steps_compute_nothing() -> None:
    pipe = tiny_pipeline()
    (batch,) = work()
    calls = counted(pipe)
    images = run_once(pipe, Uniform((True, False, True, False, False, False)), batch).images
    assert calls[0] == 2 * 2  # two fresh steps, two branches
    calls[0] = 0
    plain = run_once(pipe, Uncached(), batch).images
    assert calls[0] == 2 * STEPS
    assert not torch.equal(images, plain)


def test_skipping_reuses_the_guided_output_exactly() -> None:
    pipe = tiny_pipeline()
    (batch,) = work()
    seen: list[Tensor] = []

    def advance(index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        seen.append(velocity.clone())
        return velocity

    with (
        torch.no_grad(),
        skip_steps(pipe, [True, False, False, True, False, False], lambda: advance),
    ):
        run_pipeline(pipe, batch.arguments)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2])
    assert torch.equal(seen[3], seen[5]) and not torch.equal(seen[2], seen[3])


def test_the_runner_leaves_no_trace_even_after_an_error() -> None:
    pipe = tiny_pipeline()
    (batch,) = work()
    before = run_once(pipe, Uncached(), batch).images

    def fail(index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        raise RuntimeError("midway")

    with (
        pytest.raises(RuntimeError, match="midway"),
        torch.no_grad(),
        skip_steps(pipe, [True] * STEPS, lambda: fail),
    ):
        run_pipeline(pipe, batch.arguments)
    assert "forward" not in vars(pipe.transformer)
    assert "step" not in vars(pipe.scheduler)
    after = run_once(pipe, Uncached(), batch).images
    assert torch.equal(before, after)


def test_a_second_run_starts_anew() -> None:
    pipe = tiny_pipeline()
    first, second = work(3)
    method = Uniform(uniform_steps(STEPS, 2))
    with torch.no_grad(), method.attach(pipe):
        run_pipeline(pipe, first.arguments)
        shared = run_pipeline(pipe, second.arguments)
    alone = run_once(pipe, method, second).images
    assert torch.equal(shared, alone)


def test_a_schedule_of_another_length_is_refused() -> None:
    pipe = tiny_pipeline()
    (batch,) = work(steps=4)
    with pytest.raises(
        ModelMismatchError, match="for 6 steps and the pipeline takes 4: set num_inf"
    ):
        run_once(pipe, Uniform((True,) * STEPS), batch)


def test_the_first_step_must_be_fresh() -> None:
    with pytest.raises(ValueError, match="the first step must be fresh"):
        run_once(tiny_pipeline(), Uniform((False,) + (True,) * 5), work()[0])


def test_fewer_steps_is_the_pipeline_with_fewer_steps() -> None:
    pipe = tiny_pipeline()
    (batch,), (short,) = work(), work(steps=3)
    method = FewerSteps(3, STEPS)
    assert method.compute_share == 0.5
    assert torch.equal(
        run_once(pipe, method, batch).images, run_once(pipe, Uncached(), short).images
    )


def test_trajectories_hold_what_the_scheduler_saw() -> None:
    pipe = tiny_pipeline()
    trajectories = collect_trajectories(pipe, work(3))
    assert trajectories.latents.shape == (3, STEPS + 1, 64 * 48)
    assert trajectories.velocities.shape == (3, STEPS, trajectories.latents.shape[2])
    steps = np.diff(trajectories.sigmas)[None, :, None] * trajectories.velocities
    np.testing.assert_allclose(np.diff(trajectories.latents, axis=1), steps, atol=1e-5)
    assert "step" not in vars(pipe.scheduler)


def test_meancache_with_every_step_fresh_is_exact_and_with_fewer_is_near() -> None:
    pipe = tiny_pipeline()
    (batch,) = work()
    trajectories = collect_trajectories(pipe, [batch])
    sigmas = tuple(trajectories.sigmas.tolist())
    plain = run_once(pipe, Uncached(), batch).images
    full = MeanCache(tuple(Edge(t, t + 1, 1) for t in range(STEPS)), sigmas)
    assert torch.equal(run_once(pipe, full, batch).images, plain)
    best = MeanCache(mean_cache_schedules(trajectories, 4)[0], sigmas)
    worst = Uniform((True,) + (False,) * 5)
    error = (run_once(pipe, best, batch).images - plain).pow(2).mean()
    assert error < 0.1 * (run_once(pipe, worst, batch).images - plain).pow(2).mean()


def test_timing_interleaves_and_keeps_images_in_order() -> None:
    pipe = tiny_pipeline()
    parts = work(3)
    methods = [Uncached(), FewerSteps(2, STEPS)]
    ticks = []
    timings = time_interleaved(pipe, parts, methods, repeats=2, tick=lambda: ticks.append(1))
    assert len(ticks) == 2 * 2 * 2
    assert [len(t.seconds) for t in timings] == [4, 4]
    assert torch.equal(
        timings[0].images, torch.cat([run_pipeline(pipe, b.arguments) for b in parts])
    )
    assert timings[1].median_seconds < timings[0].median_seconds


def test_the_published_method_is_left_out_where_no_plan_of_groups_fits() -> None:
    """Blocks that take little of the time: caching all of them does not halve it."""
    stats = random_stats(0, prompts=2)
    slow = replace(stats, times_ms=stats.times_ms * np.array([*[0.1] * stats.num_groups, 50, 1]))
    lines: list[str] = []
    contenders = Contenders(None, slow, None, [], log=lines.append)  # type: ignore[arg-type]
    assert contenders._published(2.0) == []
    assert lines[0].startswith("layercache-published is left out at 2x: a budget of 0.500")
    assert [m.name for m in contenders._published(1.01)] == ["layercache-published"]
