"""A denoiser whose output is a line in sigma, so that every path has one known answer.

Oracles: sums over the noise levels, written out. Hooks, scheduler and executor have to give them.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import Tensor, nn

from layercache.errors import ModelMismatchError
from layercache.models.stepping import sigmas_of
from layercache.runtime import LayerCacheScheduler, StepExecutor, apply_plan
from tests.runtime.harness import make_plan as made
from tests.runtime.harness import step
from tests.runtime.test_executor import SOLVERS, published_taps

STEPS = 8
make_plan = functools.partial(made, branches=1)
SHAPE = (1, 2, 4, 4)
OFFSET = torch.linspace(-1, 1, 32).reshape(SHAPE)
SLOPE = torch.linspace(2, 0.5, 32).reshape(SHAPE)
NOISE = torch.linspace(1, -2, 32).reshape(SHAPE)


class Line(nn.Module):
    """v = a + b sigma, whatever the latent. No adapter knows it."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.calls = 0

    def forward(self, latent: Tensor, timestep: Tensor) -> Tensor:
        self.calls += 1
        return OFFSET + SLOPE * (timestep / 1000)


class Pipe:
    """The loop of diffusers' pipelines."""

    def __init__(self, scheduler: Any) -> None:
        self.transformer, self.scheduler = Line(), scheduler

    def __call__(self, num_inference_steps: int = STEPS) -> Tensor:
        with torch.no_grad():
            self.scheduler.set_timesteps(num_inference_steps)
            latent = NOISE
            for t in self.scheduler.timesteps:
                velocity = self.transformer(latent, t)
                latent = self.scheduler.step(velocity, t, latent, return_dict=False)[0]
        return latent


def line(sigma: float) -> Tensor:
    return OFFSET + SLOPE * sigma


def all_paths(pipe: Pipe, cells: str, taps: Any) -> dict[str, Tensor]:
    """What each path makes of a plan, having called the model at its computed steps alone."""
    plain = pipe.scheduler
    plain.set_timesteps(STEPS)
    sigmas = sigmas_of(plain)
    plan = make_plan(pipe, STEPS, [step(cells, taps)], sigmas=sigmas)
    found: dict[str, Tensor] = {}
    pipe.transformer.calls = 0
    with apply_plan(pipe, plan) as run:
        found["hooks"] = pipe()
    assert run.report().warnings == ()
    hooked = pipe.transformer.calls
    pipe.scheduler = LayerCacheScheduler.from_plan(plan, plain)
    pipe.transformer.calls = 0
    found["scheduler"] = pipe()
    pipe.scheduler = plain
    assert hooked == pipe.transformer.calls == cells.count("#")
    executor: StepExecutor[Tensor] = StepExecutor.of(plan)
    found["executor"] = executor.run(lambda latent, sigma: line(sigma), NOISE)
    return found


@pytest.mark.parametrize("cells", ["##000000", "##0#00#0", "###0#0##"])
def test_euler_ends_at_the_sum_over_all_steps(cells: str) -> None:
    pipe = Pipe(FlowMatchEulerDiscreteScheduler(shift=3.0))
    uncached = pipe()
    sigmas = sigmas_of(pipe.scheduler)
    answer = NOISE + sum((b - a) * line(a) for a, b in itertools.pairwise(sigmas))
    torch.testing.assert_close(uncached, answer, rtol=1e-5, atol=1e-5)
    for path, result in all_paths(pipe, cells, published_taps(cells, sigmas)).items():
        torch.testing.assert_close(result, answer, rtol=1e-5, atol=1e-5, msg=path)


@pytest.mark.parametrize("cells", ["##000000", "##0#00#0", "########"])
def test_heun_ends_at_the_trapezia_with_one_call_a_computed_step(cells: str) -> None:
    """The first step has nothing to read and is Euler's; the second pays back what it left."""
    pipe = Pipe(FlowMatchHeunDiscreteScheduler(shift=3.0))
    uncached = pipe()
    assert pipe.transformer.calls == 2 * STEPS - 1
    sigmas = sigmas_of(pipe.scheduler)
    trapezia = [(b - a) * line((a + b) / 2) for a, b in itertools.pairwise(sigmas)]
    trapezia[-1] = (sigmas[-1] - sigmas[-2]) * line(sigmas[-2])
    answer = NOISE + sum(trapezia)
    torch.testing.assert_close(uncached, answer, rtol=1e-5, atol=1e-5)
    for path, result in all_paths(pipe, cells, heun_taps(cells, sigmas)).items():
        torch.testing.assert_close(result, answer, rtol=1e-5, atol=1e-5, msg=path)


def heun_taps(cells: str, sigmas: Any) -> list[tuple[float, ...]]:
    """One tap a row that takes the latent from where it is to where Heun's method has it.

    All in sigma: the mean velocity of a stretch is a + b s, with s the level that counts.
    """
    done, rows, behind = list[int](), list[tuple[float, ...]](), 0.0
    for at, symbol in enumerate(cells):
        row: tuple[float, ...] = ()
        if symbol == "#":
            stop = next((e for e in range(at + 1, len(cells)) if cells[e] == "#"), len(cells))
            wanted = sum(
                (sigmas[t + 1] - sigmas[t])
                * (sigmas[t] if t == len(cells) - 1 else (sigmas[t] + sigmas[t + 1]) / 2)
                for t in range(at, stop)
            )
            length = sigmas[stop] - sigmas[at]
            behind += wanted - length * sigmas[at]
            if done:
                row = (behind / length / (sigmas[at] - sigmas[done[-1]]),)
                behind = 0.0
            done.append(at)
        rows.append(row)
    return rows


@pytest.mark.parametrize("solver", SOLVERS)
def test_other_solvers_until_the_first_skipped_step_then_the_sum(solver: str) -> None:
    pipe, cells = Pipe(SOLVERS[solver]()), "###0#00#"
    latents, moved = list[Tensor](), NOISE
    pipe.scheduler.set_timesteps(STEPS)
    for t in pipe.scheduler.timesteps:
        latents.append(moved)
        moved = pipe.scheduler.step(line(float(t) / 1000), t, latents[-1], return_dict=False)[0]
    sigmas = sigmas_of(pipe.scheduler)
    pairs = list(itertools.pairwise(sigmas))[2:]
    answer = latents[2] + sum((b - a) * line(a) for a, b in pairs)
    found = all_paths(pipe, cells, published_taps(cells, sigmas))
    # The executor alone has no other solver: it moves from the first step on.
    for path in ("hooks", "scheduler"):
        torch.testing.assert_close(found[path], answer, rtol=1e-3, atol=2e-3, msg=path)


# -- Heun's method beside its plan -----------------------------------------------------------------


def heun() -> Pipe:
    return Pipe(FlowMatchHeunDiscreteScheduler(shift=3.0))


def test_runs_of_other_step_counts_are_heun_s_own() -> None:
    pipe = heun()
    expected = pipe(5)
    pipe(STEPS)
    plan = make_plan(pipe, STEPS, [step("#0#0#0#0")])
    with apply_plan(pipe, plan), pytest.raises(ModelMismatchError, match="has 5 steps"):
        pipe(5)
    with (
        apply_plan(pipe, plan, on_mismatch="compute"),
        pytest.warns(UserWarning, match="in full"),
    ):
        assert torch.equal(pipe(5), expected)
    assert torch.equal(pipe(5), expected)


def test_a_plan_may_be_used_again_and_taken_off() -> None:
    pipe = heun()
    uncached = pipe()
    plan = make_plan(pipe, STEPS, [step("##0#0#0#")])
    with apply_plan(pipe, plan) as run:
        first = pipe()
        assert torch.equal(pipe(), first)
        report = run.report()
        assert (report.runs, report.steps_seen, report.calls_seen) == (2, STEPS, 1)
    assert torch.equal(pipe(), uncached)
    assert not torch.equal(first, uncached)


def test_a_plan_for_heun_gives_the_same_under_euler() -> None:
    """The plan moves the latent at every step, so that nothing of the scheduler is left."""
    pipe = heun()
    pipe()
    cells = "##0#00#0"
    plan = make_plan(pipe, STEPS, [step(cells, heun_taps(cells, sigmas_of(pipe.scheduler)))])
    with apply_plan(pipe, plan):
        expected = pipe()
    euler = Pipe(FlowMatchEulerDiscreteScheduler(shift=3.0))
    with apply_plan(euler, plan):
        torch.testing.assert_close(euler(), expected, rtol=1e-5, atol=1e-5)
