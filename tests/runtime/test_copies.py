"""Copies, pickles and neighbours of a pipeline under a plan are pipelines without one."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from layercache.models.gates import gate_of
from layercache.models.patching import wrap_method
from layercache.models.stepping import tap_step
from layercache.runtime import apply_plan
from tests.runtime.harness import LoopPipeline, make_plan
from tests.runtime.mixed import MIXED, STEPS, pipeline


def by_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def by_torch(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch])
def test_a_copy_of_a_pipeline_is_free_of_the_plan(duplicate: Any) -> None:
    pipe = pipeline()
    uncached = pipe(STEPS)
    with apply_plan(pipe, make_plan(pipe, STEPS, MIXED)) as run:
        expected = pipe(STEPS)
        other: LoopPipeline = duplicate(pipe)
        assert all(gate_of(module) is None for module in other.transformer.modules())
        assert torch.equal(other(STEPS), uncached)
        assert torch.equal(pipe(STEPS), expected)
        assert run.report().warnings == ()
    assert torch.equal(other(STEPS), uncached)
    # A plan can be put on the copy, also while one is on the original.
    with (
        apply_plan(pipe, make_plan(pipe, STEPS, MIXED)),
        apply_plan(other, make_plan(other, STEPS, MIXED)) as second,
    ):
        assert torch.equal(other(STEPS), expected)
        assert torch.equal(pipe(STEPS), expected)
    assert second.report().warnings == ()


def test_a_copied_scheduler_steps_by_itself() -> None:
    """LTX2 and others copy their scheduler in every call, for a second kind of latents."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    restore = tap_step(scheduler, lambda index, velocity, sample: 2 * velocity)
    other = copy.deepcopy(copy.deepcopy(scheduler))
    for one in (scheduler, other):
        one.set_timesteps(4)
        one.set_begin_index(0)
    sample, velocity = torch.zeros(3), torch.ones(3)
    doubled = scheduler.step(velocity, scheduler.timesteps[0], sample).prev_sample
    plain = other.step(velocity, other.timesteps[0], sample).prev_sample
    assert torch.allclose(doubled, 2 * plain)
    assert scheduler._step_index == other._step_index == 1
    restore()
    assert "step" not in vars(scheduler)


def test_arguments_by_name_and_the_signature_reach_the_scheduler() -> None:
    import inspect

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    plain = inspect.signature(scheduler.step)
    restore = tap_step(scheduler, lambda index, velocity, sample: velocity)
    assert inspect.signature(scheduler.step) == plain
    scheduler.set_timesteps(4)
    result = scheduler.step(
        model_output=torch.ones(3), timestep=scheduler.timesteps[0], sample=torch.zeros(3),
        return_dict=False,
    )  # fmt: skip
    assert isinstance(result, tuple)
    restore()


class Counter:
    """Something with a method."""

    def count(self) -> list[str]:
        return ["plain"]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0), (0, 2, 1)])
def test_wrappers_come_off_in_any_order(order: tuple[int, ...]) -> None:
    owner = Counter()

    def naming(name: str) -> Any:
        return lambda inner: [*inner(), name]

    restores = [wrap_method(owner, "count", naming(name)) for name in "abc"]
    assert owner.count() == ["plain", "a", "b", "c"]
    left = list("abc")
    for index in order:
        restores[index]()
        left.remove("abc"[index])
        assert owner.count() == ["plain", *left]
        restores[index]()
    assert vars(owner) == {}


def test_a_wrapper_on_a_foreign_attribute_gives_it_back() -> None:
    owner = Counter()
    owner.count = lambda: ["foreign"]  # type: ignore[method-assign]
    foreign = owner.count
    restore = wrap_method(owner, "count", lambda inner: [*inner(), "ours"])
    assert owner.count() == ["foreign", "ours"]
    assert copy.deepcopy(owner).count() == ["foreign"]
    restore()
    assert owner.count is foreign
