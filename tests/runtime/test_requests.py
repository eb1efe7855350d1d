"""A request's own copy of a pipeline, with a scheduler of its own, as servers make them.

Oracle: the plan on the pipeline that was copied.
"""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from layercache.models.patching import wrappers
from layercache.models.stepping import sigmas_of
from layercache.runtime import apply_plan
from tests.runtime.harness import group, make_plan, step
from tests.runtime.pipelines import STEPS, build, plan_for, planned, quiet, wan_with_two_experts

NAMES = ["QwenImagePipeline", "StableDiffusion3Pipeline", "WanPipeline", "FluxPipeline"]


class Stop(Exception):
    """Raised in the middle of a run."""


def request(pipe: Any, duplicate: Any = copy.deepcopy) -> Any:
    mine = copy.copy(pipe)
    mine.scheduler = duplicate(pipe.scheduler)
    return mine


def renewed(scheduler: Any) -> Any:
    return type(scheduler).from_config(scheduler.config)


def caller_on(name: str, pipe: Any) -> Any:
    """The call of `build`, made on another pipeline object."""
    _, call = build(name)
    call.__closure__[[v for v in call.__code__.co_freevars].index("pipe")].cell_contents = pipe
    return call


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, renewed])
def test_a_requests_own_copy_runs_the_plan(name: str, duplicate: Any) -> None:
    main, call = build(name)
    uncached = call()
    plan = planned(main, call)
    with apply_plan(main, plan) as run:
        expected = call()
        mine = request(main, duplicate)
        call_mine = caller_on(name, mine)
        for _ in range(2):
            assert torch.equal(call_mine(), expected)
            assert run.report().warnings == ()
            assert run.report().other_calls == {}
            assert run.held_bytes == 0
        with pytest.raises(Stop):
            call_mine(callback_on_step_end=stopping_at(1))
        assert run.held_bytes == 0
        assert torch.equal(call(), expected)
        assert torch.equal(call_mine(), expected)
        assert run.report().runs == 6
    # Off is off, for the copy too.
    assert torch.equal(call_mine(), uncached)
    assert torch.equal(call(), uncached)
    assert not list(wrappers(mine.scheduler, "step"))
    assert not list(wrappers(mine, "progress_bar"))


def stopping_at(at: int) -> Any:
    def stopping(pipe: Any, index: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == at:
            raise Stop
        return kwargs

    return stopping


def test_copies_that_are_interleaved_run_the_plan_each() -> None:
    main, call = build("WanPipeline")
    plan = plan_for(main, call, [step("##0##"), group("blocks", 0, 4, "##.01")])
    with apply_plan(main, plan) as run:
        expected = call()
        mine = caller_on("WanPipeline", request(main))
        shown: list[Tensor] = []

        def show(pipe: Any, index: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            shown.append(mine())
            return kwargs

        assert torch.equal(call(callback_on_step_end=show), expected)
        assert all(torch.equal(result, expected) for result in shown)
        assert run.report().warnings == ()
        assert run.held_bytes == 0


def test_what_copies_leave_behind_goes_with_them() -> None:
    main, call = build("WanPipeline")
    with apply_plan(main, plan_for(main, call, [step("##0#0")])) as run:
        call()
        kept = [weakref.ref(request(main)) for _ in range(3)]
        for _ in range(3):
            mine = request(main)
            kept += [weakref.ref(mine), weakref.ref(mine.scheduler)]
            caller_on("WanPipeline", mine)()
            del mine
        # The last one is reported.
        gc.collect()
        assert [ref() is None for ref in kept] == [True] * 7 + [False] * 2
        call()
        gc.collect()
        assert all(ref() is None for ref in kept)
        assert run.report().warnings == ()


def test_copies_in_threads_of_their_own_run_the_plan() -> None:
    main, call = build("WanPipeline")
    plan = plan_for(main, call, [step("##0##"), group("blocks", 0, 4, "##.01")])
    with apply_plan(main, plan) as run, warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = call()
        found: dict[int, Tensor] = {}

        def serve(number: int) -> None:
            found[number] = caller_on("WanPipeline", request(main))()

        threads = [threading.Thread(target=serve, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(found) == [0, 1, 2, 3]
        assert all(torch.equal(result, expected) for result in found.values())
        assert run.report().warnings == ()


def test_a_copy_with_another_scheduler_says_so() -> None:
    main, call = build("WanPipeline")
    setting = {"scheduler": "FlowMatchEulerDiscreteScheduler"}
    plan = plan_for(main, call, [step("##0#0")]).model_copy(update={"setting": setting})

    class Other(type(main.scheduler)):  # type: ignore[misc]
        """Another class."""

    with apply_plan(main, plan) as run:
        mine = copy.copy(main)
        mine.scheduler = Other.from_config(main.scheduler.config)
        with pytest.warns(UserWarning, match="scheduler is") as caught:
            caller_on("WanPipeline", mine)()
        assert len(caught) == 1
        assert any("'Other' here" in text for text in run.report().warnings)


def test_a_pipeline_that_is_built_anew_says_that_it_does_not_run_the_plan() -> None:
    main, call = build("WanPipeline")
    uncached = call()
    plan = planned(main, call)
    with apply_plan(main, plan) as run:
        mine = type(main)(**{**main.components, "scheduler": copy.deepcopy(main.scheduler)})
        mine.set_progress_bar_config(disable=True)
        with pytest.warns(UserWarning, match=r"its runs are computed in full") as caught:
            assert torch.equal(caller_on("WanPipeline", mine)(), uncached)
            caller_on("WanPipeline", mine)()
        assert len(caught) == 1
        assert any("computed in full" in text for text in run.report().warnings)
        assert run.report().other_calls == {"WanPipeline": 4 * STEPS}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy])
def test_a_copy_of_a_pipeline_with_two_experts(duplicate: Any) -> None:
    pipe, call = quiet(*wan_with_two_experts())
    call()
    sigmas = sigmas_of(pipe.scheduler)

    def plan(component: str, cells: str) -> Any:
        class Named:
            transformer, scheduler = getattr(pipe, component), pipe.scheduler

        return make_plan(Named, STEPS, [step(cells)], sigmas=sigmas)

    high, low = plan("transformer", "##0##"), plan("transformer_2", "####0")
    with (
        apply_plan(pipe, high) as first,
        apply_plan(pipe, low, component="transformer_2") as second,
    ):
        expected = call()
        mine = request(pipe, duplicate)
        call_mine = caller_on("WanPipeline", mine)
        for _ in range(2):
            assert torch.equal(call_mine(), expected)
            for run, seen in ((first, 3), (second, 2)):
                assert run.report().warnings == ()
                assert (run.report().steps_seen, run.report().steps_elsewhere) == (
                    seen,
                    STEPS - seen,
                )
    assert not list(wrappers(mine.scheduler, "step"))


def test_a_pipeline_made_from_another_shares_its_scheduler_and_its_plan() -> None:
    main, call = build("WanPipeline")
    with apply_plan(main, planned(main, call)) as run:
        expected = call()
        other = type(main)(**main.components)
        other.set_progress_bar_config(disable=True)
        assert torch.equal(caller_on("WanPipeline", other)(), expected)
        assert run.report().warnings == ()
        other.scheduler = copy.deepcopy(other.scheduler)
        with pytest.warns(UserWarning, match="computed in full"):
            caller_on("WanPipeline", other)()
