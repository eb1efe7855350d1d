"""Every adapter on a real, tiny model. Oracle: `harness.SlowRuntime`."""

from __future__ import annotations

import random

import pytest
import torch

from layercache.models import model_fingerprint, supported_models
from layercache.runtime import apply_plan
from tests.models.zoo import BUILDERS, build
from tests.runtime.harness import (
    LoopPipeline,
    SlowRuntime,
    group,
    make_plan,
    random_units,
    step,
    traces,
)

STEPS = 6
TOLERANCE = 1e-5


def pipeline(name: str) -> LoopPipeline:
    return LoopPipeline(*build(name))


def block_lists(pipe: LoopPipeline) -> dict[str, int]:
    counts: dict[str, int] = model_fingerprint(pipe.transformer)["block_lists"]
    return counts


def test_every_adapter_has_a_model_here() -> None:
    assert set(supported_models()) >= set(BUILDERS)
    assert len(BUILDERS) >= 24


@pytest.mark.parametrize("name", BUILDERS)
def test_a_plan_that_computes_everything_is_bit_identical(name: str) -> None:
    pipe = pipeline(name)
    expected = pipe(3)
    units = [step("###")] + [group(n, 0, c, "###") for n, c in block_lists(pipe).items()]
    with apply_plan(pipe, make_plan(pipe, 3, units)) as run:
        assert torch.equal(pipe(3), expected)
    assert run.report().warnings == ()


@pytest.mark.parametrize("name", BUILDERS)
def test_exact_residuals_reproduce_the_output(name: str) -> None:
    pipe = pipeline(name)
    units = []
    for list_name, count in block_lists(pipe).items():
        units += [group(list_name, 0, 1, "#0"), group(list_name, 1, count, "#0")]
    plan = make_plan(pipe, 2, units, branches=1)
    with torch.no_grad():
        expected = pipe.call(0.7, None, "cond")
        with apply_plan(pipe, plan) as run:
            pipe.scheduler.set_timesteps(2)
            latent = torch.zeros_like(expected)
            for t in pipe.scheduler.timesteps:
                # The same inputs at both steps, so that the first step's residuals are exact.
                output = pipe.call(0.7, None, "cond")
                pipe.scheduler.step(output, t, latent)
    assert (output - expected).abs().max() < TOLERANCE * expected.abs().max()
    report = run.report()
    assert report.warnings == ()
    assert all(list(unit.seen_predicted.values()) == [1] for unit in report.units)


@pytest.mark.parametrize("name", BUILDERS)
def test_random_plans_equal_a_slow_runtime(name: str) -> None:
    pipe = pipeline(name)
    uncached = pipe(STEPS)
    # After the first run, since diffusers' own cache_context leaves a registry behind.
    before = traces(pipe.transformer)
    rng = random.Random(name)
    for with_step in (True, False):
        units = random_units(block_lists(pipe), STEPS, rng, with_step)
        expected = SlowRuntime(pipe, STEPS, units).run()
        with apply_plan(pipe, make_plan(pipe, STEPS, units)) as run:
            result = pipe(STEPS)
        assert (result - expected).abs().max() < TOLERANCE * expected.abs().max()
        assert run.report().warnings == ()
        assert (result - uncached).abs().max() > 10 * TOLERANCE * expected.abs().max()
    assert traces(pipe.transformer) == before
    assert torch.equal(pipe(STEPS), uncached)
