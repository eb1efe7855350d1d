"""diffusers' modular pipelines under a plan.

Oracle: the same pipeline by itself, with no plan on, or with the plan on and nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from layercache.models.pipelines import run_pipeline
from layercache.runtime import apply_plan
from tests.runtime import modular
from tests.runtime.harness import step
from tests.runtime.test_requests import request


class Stop(Exception):
    """Raised in the middle of a run."""


@contextlib.contextmanager
def counted(pipe: Any) -> Iterator[list[int]]:
    """Calls that reach the model itself."""
    count = [0]
    blocks = next(iter(pipe.transformer.children()))
    blocks = getattr(
        pipe.transformer, "transformer_blocks", getattr(pipe.transformer, "blocks", blocks)
    )
    handle = blocks[0].register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    yield count
    handle.remove()


@pytest.mark.parametrize("name", modular.MODULAR)
@pytest.mark.parametrize("output", ["latents", None, ["latents"]])
def test_a_modular_pipeline_runs_the_plan_however_it_returns(name: str, output: Any) -> None:
    pipe, call = modular.build(name)
    uncached = call()
    plan = modular.plan_of(pipe, call)
    with apply_plan(pipe, plan) as run, counted(pipe) as count:
        result = call()
        assert count[0] == 3 * plan.branches
        again = call(output=output)
        values = (
            again
            if isinstance(again, Tensor)
            else again["latents"]
            if output
            else again.get("latents")
        )
        assert torch.equal(values, result)
        assert run.report().warnings == ()
        assert run.held_bytes == 0
    assert not torch.equal(result, uncached)
    assert torch.equal(call(), uncached)
    everything = plan.model_copy(update={"units": (step("#####"),)})
    with apply_plan(pipe, type(plan)(**dict(everything))):
        assert torch.equal(call(), uncached)


@pytest.mark.parametrize("name", modular.MODULAR)
@pytest.mark.parametrize("error", [KeyboardInterrupt, Stop])
@pytest.mark.parametrize("where", ["after the step", "scheduler", "transformer"])
def test_a_modular_run_that_is_broken_off_is_over(
    name: str, error: type[BaseException], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, call_first = modular.build(name)
    _, call_second = modular.build(name, first.transformer)
    alone = call_second(3, steps=3)
    plan = modular.plan_of(first, call_first)
    count = 0

    def failing(inner: Any) -> Any:
        def fail(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            result = inner(*args, **kwargs)
            count += 1
            if count == 2:
                raise error
            return result

        return fail

    with apply_plan(first, plan) as run:
        expected = call_first()
        with monkeypatch.context() as patch:
            if where == "after the step":
                kind = type(modular.loop_block(first))
                patch.setattr(kind, "__call__", failing(kind.__call__))
            elif where == "scheduler":
                patch.setattr(first.scheduler, "scale_noise", first.scheduler.scale_noise)
                kind = type(first.scheduler)
                patch.setattr(kind, "index_for_timestep", kind.index_for_timestep)
                patch.setattr(first.scheduler, "step", failing(first.scheduler.step))
            else:
                block = next(
                    b
                    for b in first.transformer.modules()
                    if hasattr(b, "attn") or hasattr(b, "attn1")
                )
                patch.setattr(block, "forward", failing(block.forward))
            with pytest.raises(error):
                call_first()
        assert run.held_bytes == 0
        assert torch.equal(call_second(3, steps=3), alone)
        assert torch.equal(call_first(), expected)
        assert run.report().warnings == ()
    assert torch.equal(call_second(3, steps=3), alone)


def test_the_progress_bars_of_modular_blocks_are_given_back() -> None:
    pipe, call = modular.build("flux")
    plan = modular.plan_of(pipe, call)
    owners = [block for block in pipe._blocks.sub_blocks.values() if hasattr(block, "progress_bar")]
    before = [set(vars(owner)) for owner in [pipe, pipe.scheduler, *owners]]
    with apply_plan(pipe, plan):
        assert any("progress_bar" in vars(owner) for owner in owners)
        # A copy of the blocks, as `pipe.blocks` is one, has no part in it.
        assert all(
            "progress_bar" not in vars(b)
            or vars(b)["progress_bar"] is None
            or not hasattr(vars(b)["progress_bar"], "owner")
            for b in pipe.blocks.sub_blocks.values()
        )
    assert [set(vars(owner)) for owner in [pipe, pipe.scheduler, *owners]] == before


@pytest.mark.parametrize("name", modular.MODULAR)
def test_results_of_modular_and_other_pipelines_are_read_alike(name: str) -> None:
    pipe, call = modular.build(name)
    taken: dict[str, Any] = {}

    class Watched:
        """Keeps the arguments of the call."""

        def __call__(self, **kwargs: Any) -> Any:
            taken.update(kwargs)
            return pipe(**kwargs)

    call(on=Watched())
    arguments = {k: v for k, v in taken.items() if k != "output"}
    generator = arguments["generator"] = torch.Generator().manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = run_pipeline(pipe, arguments)
    assert torch.equal(first, call().float())
    # The generator was left as it was.
    assert torch.equal(run_pipeline(pipe, arguments), first)
    assert generator.initial_seed() == 0


@pytest.mark.parametrize("name", modular.MODULAR)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy])
def test_a_copy_of_a_modular_pipeline_runs_the_plan(name: str, duplicate: Any) -> None:
    main, call = modular.build(name)
    uncached = call()
    with apply_plan(main, modular.plan_of(main, call)) as run:
        expected = call()
        mine = request(main, duplicate)
        for _ in range(2):
            assert torch.equal(call(on=mine), expected)
            assert run.report().warnings == ()
            assert run.held_bytes == 0
        assert torch.equal(call(), expected)
        assert run.report().other_calls == {}
    assert torch.equal(call(on=mine), uncached)
