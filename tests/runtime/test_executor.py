"""The step executor alone and on pipelines. Oracles: known series, sums, the hooked pipeline."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from layercache.models.stepping import sigmas_of, solver_of
from layercache.plan import Plan
from layercache.runtime import StepExecutor, apply_plan
from tests.models.zoo import build
from tests.runtime.harness import LoopPipeline, group, make_plan, random_units, step
from tests.runtime.mixed import LIST, pipeline
from tests.runtime.pipelines import PIPELINES, plan_for, quiet, wan_with_two_experts
from tests.runtime.pipelines import build as build_pipeline

STEPS = 6


def plan_of(cells: str, taps: Any = None) -> Plan:
    return make_plan(pipeline(), len(cells), [step(cells, taps)])


def test_the_executor_works_without_torch() -> None:
    code = (
        "import sys; from layercache.runtime.executor import StepExecutor; "
        "sys.exit(sorted({'torch', 'diffusers'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def published_taps(cells: str, sigmas: Any) -> list[tuple[float, ...]]:
    """One tap a computed step: the mean of the line through the last two outputs, over the move."""
    done, rows = [], []
    for index, symbol in enumerate(cells):
        row: tuple[float, ...] = ()
        if symbol == "#":
            stop = next((e for e in range(index + 1, len(cells)) if cells[e] == "#"), len(cells))
            inside = range(index, stop)
            lengths = [sigmas[t + 1] - sigmas[t] for t in inside]
            if done and stop > index + 1:
                rises = [(sigmas[t] - sigmas[index]) for t in inside]
                mean = np.dot(lengths, rises) / sum(lengths)
                row = (mean / (sigmas[index] - sigmas[done[-1]]),)
            done.append(index)
        rows.append(row)
    return rows


@pytest.mark.parametrize("cells", ["##0000", "##0#00", "###0#0", "######"])
def test_a_linear_series_is_extrapolated_exactly(cells: str) -> None:
    """Of v = a + b sigma: the latent ends where the sum over all steps leaves it."""
    sigmas = sigmas_of_pipeline()
    plan = plan_of(cells, published_taps(cells, sigmas))
    offset, slope = np.array([1.0, -2.0, 0.5]), np.array([3.0, 0.25, -1.0])
    calls: list[float] = []

    def velocity(latent: Any, sigma: float) -> Any:
        calls.append(sigma)
        return offset + slope * sigma

    executor: StepExecutor[Any] = StepExecutor.of(plan)
    found = executor.run(velocity, np.zeros(3))
    wanted = sum((b - a) * (offset + slope * a) for a, b in itertools.pairwise(sigmas))
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    assert (
        calls
        == [sigmas[t] for t in executor.visited]
        == [sigmas[t] for t, symbol in enumerate(cells) if symbol == "#"]
    )
    assert executor.held == []


def sigmas_of_pipeline(steps: int = STEPS) -> tuple[float, ...]:
    pipe = pipeline()
    pipe.scheduler.set_timesteps(steps)
    return sigmas_of(pipe.scheduler)


class Linear(LoopPipeline):
    """Its model's output is replaced by a line in sigma."""

    def velocity(self, sigma: float, latent: Tensor | None) -> Tensor:
        made = super().velocity(sigma, latent)
        line = torch.linspace(-1, 1, made.numel()) + sigma * torch.linspace(2, 0.5, made.numel())
        return line.reshape(made.shape)


def test_a_linear_series_is_extrapolated_exactly_on_a_pipeline() -> None:
    pipe = Linear(*build("QwenImageTransformer2DModel"))
    uncached = pipe(STEPS)
    cells = "##0#00"
    taps = published_taps(cells, sigmas_of(pipe.scheduler))
    with apply_plan(pipe, make_plan(pipe, STEPS, [step(cells, taps)])) as run:
        result = pipe(STEPS)
    assert run.report().warnings == ()
    torch.testing.assert_close(result, uncached, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_the_executor_alone_makes_what_the_pipeline_makes(seed: int) -> None:
    pipe = pipeline()
    (unit,) = random_units({}, STEPS, random.Random(seed))
    plan = make_plan(pipe, STEPS, [unit])
    with apply_plan(pipe, plan):
        expected = pipe(STEPS)
    calls = 0

    def velocity(latent: Tensor | None, sigma: float) -> Tensor:
        nonlocal calls
        calls += 1
        # The pipeline makes its starting latent of the shape of its first velocity.
        return pipe.velocity(sigma, None if calls == 1 else latent)

    start = torch.linspace(-1.0, 2.0, expected.numel()).reshape(expected.shape)
    with torch.no_grad():
        found = StepExecutor[Any].of(plan).run(velocity, start)
    assert calls == unit.cells.count("#")
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_numbers_will_do_and_a_missing_value_is_told() -> None:
    plan = plan_of("##0#00", [(), (0.5,), (), (0.5, -0.25), (), ()])
    executor: StepExecutor[float] = StepExecutor.of(plan)
    assert (executor.visited, executor.first_pause) == ((0, 1, 3), 1)
    assert [executor.after(s) for s in executor.visited] == [1, 3, 6]
    assert executor.compute(0, 4.0) == 4.0
    assert executor.compute(1, 2.0) == 2.0 + 0.5 * (2.0 - 4.0)
    assert executor.repeated(2) == 1.0
    executor.finish(2)
    assert executor.compute(3, 8.0) == 8.0 + 0.5 * (8.0 - 2.0) - 0.25 * (8.0 - 4.0)
    executor.finish(3)
    assert executor.held == [executor.repeated(4)] == [10.0]
    executor.finish(5)
    assert executor.held == []
    # A run that starts late has nothing to read.
    assert executor.compute(3, 8.0) is None
    assert executor.repeated(4) is None
    everything: StepExecutor[float] = StepExecutor.of(
        make_plan(pipeline(), 3, [group(LIST, 0, 2, "###")])
    )
    assert (everything.visited, everything.first_pause) == ((0, 1, 2), 3)


@pytest.mark.parametrize("seed", range(8))
def test_what_is_held_is_what_the_schedule_says(seed: int) -> None:
    (unit,) = random_units({}, 9, random.Random(seed))
    plan = make_plan(pipeline(), 9, [unit])
    executor: StepExecutor[float] = StepExecutor.of(plan)
    schedule = plan.schedules["step"]
    for at in range(9):
        if schedule.computed[at]:
            executor.compute(at, float(at))
        assert len(executor.held) == schedule.stored_at(at) + schedule.pauses_at(at)
        executor.finish(at)
    assert executor.held == []


# -- samplers that are not Euler's -----------------------------------------------------------------


class Batched(LoopPipeline):
    """Latents with a batch and a channel axis, which these schedulers count on."""

    def call(self, sigma: float, latent: Tensor | None, branch: str) -> Tensor:
        return super().call(sigma, latent, branch)[None, None]


SOLVERS: dict[str, Any] = {
    "UniPC": lambda: UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    "DPM++": lambda: DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    "DPM++ 3": lambda: DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=3
    ),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("cells", ["###0#00#", "#0######", "#####000", "#00#0#0#"])
def test_from_the_first_skipped_step_on_the_plan_moves_the_latent(solver: str, cells: str) -> None:
    """Before it, the scheduler does, as if there were no plan."""
    pipe = Batched(*build("QwenImageTransformer2DModel"))
    pipe.scheduler = SOLVERS[solver]()
    steps, trail = len(cells), []
    uncached = pipe(steps)
    assert solver_of(set_to(pipe.scheduler, steps)) == "other"
    sigmas = sigmas_of(pipe.scheduler)
    taps = [
        (0.3,) if symbol == "#" and t > cells.index("0") else () for t, symbol in enumerate(cells)
    ]
    plan = make_plan(pipe, steps, [step(cells, taps)], sigmas=sigmas)
    original = type(pipe.scheduler).step

    def watching(self: Any, velocity: Tensor, time: Any, sample: Tensor, **kwargs: Any) -> Any:
        trail.append((velocity, sample))
        return original(self, velocity, time, sample, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipe.scheduler), "step", watching)
        pipe(steps)
        plain = trail[:]
        with apply_plan(pipe, plan) as run:
            pipe(steps)
            trail.clear()
            result = pipe(steps)
    assert run.report().warnings == ()
    first = cells.index("0") - 1
    for t in range(first + 1):
        assert torch.equal(trail[t][1], plain[t][1])
    samples = [sample for _, sample in trail] + [result]
    for t in range(first, steps):
        moved = samples[t] + (sigmas[t + 1] - sigmas[t]) * trail[t][0]
        torch.testing.assert_close(samples[t + 1], moved, rtol=1e-5, atol=1e-5)
        if cells[t] == "0":
            assert torch.equal(trail[t][0], trail[t - 1][0])
    assert not torch.equal(result, uncached)
    # A plan that computes everything leaves the scheduler to itself.
    everything = make_plan(
        pipe, steps, [step("#" * steps), group(LIST, 0, 4, "#" * steps)], sigmas=sigmas
    )
    with apply_plan(pipe, everything):
        assert torch.equal(pipe(steps), uncached)


def set_to(scheduler: Any, steps: int) -> Any:
    scheduler.set_timesteps(steps)
    return scheduler


# Z-Image asks its scheduler for a shift that UniPC does not have.
@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "ZImagePipeline"])
def test_pipelines_of_diffusers_under_another_sampler(name: str) -> None:
    pipe, call = build_pipeline(name)
    pipe.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    uncached = call()
    plan = plan_for(pipe, call, [step("###0#", [(), (), (), (), (0.4, -0.1)])])
    with apply_plan(pipe, plan) as run:
        result = call()
        assert torch.equal(call(), result)
        assert run.report().warnings == ()
    assert not torch.equal(result, uncached)
    assert result.isfinite().all()
    assert torch.equal(call(), uncached)


def test_two_experts_under_another_sampler_have_one_path() -> None:
    """After one expert's skipped step the scheduler's memory serves neither."""
    pipe, call = quiet(*wan_with_two_experts())
    pipe.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    call()
    sigmas = sigmas_of(pipe.scheduler)
    trail: list[tuple[Tensor, Tensor]] = []
    original = type(pipe.scheduler).step

    def watching(self: Any, velocity: Tensor, time: Any, sample: Tensor, **kwargs: Any) -> Any:
        trail.append((velocity, sample))
        return original(self, velocity, time, sample, **kwargs)

    def plan(component: str, cells: str, taps: Any) -> Plan:
        class Named:
            transformer, scheduler = getattr(pipe, component), pipe.scheduler

        return make_plan(Named, 5, [step(cells, taps)], sigmas=sigmas)

    high = plan("transformer", "##0##", None)
    low = plan("transformer_2", "####0", [(), (), (), (), ()])
    for order in (
        (("transformer", high), ("transformer_2", low)),
        (("transformer_2", low), ("transformer", high)),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(pipe.scheduler), "step", watching)
            runs = [apply_plan(pipe, made, component=name) for name, made in order]
            call()
            trail.clear()
            result = call()
        samples = [sample for _, sample in trail] + [result]
        for t in range(1, 5):
            moved = samples[t] + (sigmas[t + 1] - sigmas[t]) * trail[t][0]
            torch.testing.assert_close(samples[t + 1], moved, rtol=1e-5, atol=1e-5)
        for run in runs:
            assert run.report().warnings == ()
            run.remove()


def test_solvers_are_told_apart() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

    state = torch.get_rng_state()
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert solver_of(set_to(euler, 4)) == "euler"
    noisy = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    assert solver_of(set_to(noisy, 4)) == "noisy"
    assert solver_of(set_to(FlowMatchLCMScheduler(shift=3.0), 4)) == "noisy"
    for make in SOLVERS.values():
        assert solver_of(set_to(make(), 4)) == "other"
    assert torch.equal(torch.get_rng_state(), state)
    assert euler._step_index is None


# -- groups ----------------------------------------------------------------------------------------


def test_a_linear_residual_is_extrapolated_exactly_with_one_tap_or_several() -> None:
    """Both a published span and fitted taps that add up alike predict a line in sigma."""
    from layercache.models.clock import Clock
    from layercache.plan import UnitPlan
    from layercache.runtime._groups import GroupRunner

    sigmas = sigmas_of_pipeline()
    offset, slope = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    residuals = [offset + slope * sigma for sigma in sigmas]
    lines = [(sigmas[4] - sigmas[3]) / (sigmas[3] - sigmas[s]) for s in (1, 0)]
    for cells, taps in (
        ("##0#20", None),
        ("##0#2#", [(), (), (), (), (lines[0],), ()]),
        ("##0#3#", [(), (), (), (), (0.25 * lines[0], 0.75 * lines[1]), ()]),
    ):
        unit = UnitPlan(
            kind="group", block_list="blocks", start=0, stop=1, cells=cells,
            taps=None if taps is None else tuple(tuple(row) for row in taps),
        )  # fmt: skip
        problems: list[str] = []
        clock = Clock(torch.device("cpu"))
        block_list: Any = None
        blocks = [torch.nn.Identity()]
        runner = GroupRunner(
            unit, unit.schedule(sigmas), block_list, blocks, problems.append, clock
        )
        branch = (None, 0)
        for at in (0, 1, 3):
            runner._held.setdefault(branch, {})[at] = {"x": residuals[at]}
        runner.begin(4, branch)
        torch.testing.assert_close(runner._residual["x"], residuals[4])
        assert problems == []
        # What is not there is not predicted.
        runner._held[branch].pop(1)
        runner.begin(4, branch)
        assert len(problems) == 1 and not runner._residual


@pytest.mark.parametrize("seed", range(4))
def test_plans_of_groups_carry_step_taps(seed: int) -> None:
    from tests.runtime.harness import SlowRuntime

    pipe = pipeline()
    rng = random.Random(seed)
    taps = [[rng.uniform(-0.3, 0.3) for _ in range(min(t, 3))] for t in range(STEPS)]
    units = [step("#" * STEPS, taps), *random_units({LIST: 4}, STEPS, rng, with_step=False)]
    expected = SlowRuntime(pipe, STEPS, units).run()
    plan = make_plan(pipe, STEPS, units)
    with apply_plan(pipe, plan) as run:
        result = pipe(STEPS)
    assert (result - expected).abs().max() < 1e-5 * expected.abs().max()
    report = run.report()
    assert report.warnings == ()
    assert report.cache_bytes_seen == report.cache_bytes_planned
