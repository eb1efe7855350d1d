"""One transformer, several callers: modular pipelines, nested runs, a request's own copies.

Oracle: the same pipeline by itself, with no plan on, or with the plan on and nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from layercache.models.calling import calling_pipeline
from layercache.models.patching import wrappers
from layercache.models.pipelines import run_pipeline
from layercache.models.stepping import sigmas_of
from layercache.runtime import apply_plan
from tests.runtime import modular
from tests.runtime.harness import group, make_plan, step
from tests.runtime.pipelines import STEPS, build, plan_for, planned, quiet, wan_with_two_experts

NAMES = ["QwenImagePipeline", "StableDiffusion3Pipeline", "WanPipeline", "FluxPipeline"]


class Stop(Exception):
    """Raised in the middle of a run."""


def sibling(name: str, pipe: Any) -> tuple[Any, Any]:
    """Another pipeline, with a scheduler of its own, around the transformer of the first."""
    other, call = build(name)
    other.transformer = pipe.transformer
    return other, call


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


# -- modular pipelines -----------------------------------------------------------------------------


def modular_plan(pipe: Any, call: Any, **changes: Any) -> Any:
    calls: list[int] = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    call()
    handle.remove()
    fields = {"sigmas": sigmas_of(pipe.scheduler), "branches": len(calls) // STEPS}
    return make_plan(pipe, STEPS, [step("##0#0")], **(fields | changes))


@pytest.mark.parametrize("name", modular.MODULAR)
@pytest.mark.parametrize("output", ["latents", None, ["latents"]])
def test_a_modular_pipeline_runs_the_plan_however_it_returns(name: str, output: Any) -> None:
    pipe, call = modular.build(name)
    uncached = call()
    plan = modular_plan(pipe, call)
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
    plan = modular_plan(first, call_first)
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
    plan = modular_plan(pipe, call)
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


# -- nested runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_preview_inside_a_run_is_as_alone_and_so_is_the_run(name: str, at: int) -> None:
    main, call = build(name)
    _, call_preview = sibling(name, main)
    alone = call_preview(size=48)
    plan = plan_for(main, call, [step("##0#0")])
    shown: list[Tensor] = []

    def show(pipe: Any, index: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == at:
            shown.append(call_preview(size=48))
        return kwargs

    with apply_plan(main, plan) as run:
        expected = call()
        with pytest.warns(UserWarning, match="computed in full"):
            assert torch.equal(call(callback_on_step_end=show), expected)
        assert run.report().warnings == ()
        assert sum(run.report().other_calls.values()) == STEPS * plan.branches
        assert "computed in full" in str(run.report())
    assert torch.equal(shown[0], alone)


def test_a_preview_by_groups_that_raises_leaves_the_run_as_it_is() -> None:
    main, call = build("WanPipeline")
    _, call_preview = sibling("WanPipeline", main)

    def stopping(pipe: Any, index: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        raise Stop

    def show(pipe: Any, index: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        with contextlib.suppress(Stop):
            call_preview(callback_on_step_end=stopping)
        return kwargs

    plan = plan_for(main, call, [step("##0##"), group("blocks", 0, 4, "##.01")])
    with apply_plan(main, plan) as run:
        expected = call()
        assert torch.equal(call(callback_on_step_end=show), expected)
    assert run.report().warnings == ()


def test_a_modular_preview_inside_a_run_and_a_run_inside_a_modular_one() -> None:
    main, call = build("FluxPipeline")
    other, call_other = modular.build("flux", main.transformer)
    alone, uncached = call_other(), call()
    plan = plan_for(main, call, [step("##0#0")])
    shown: list[Tensor] = []

    def show(pipe: Any, index: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        shown.append(call_other())
        return kwargs

    with apply_plan(main, plan) as run:
        expected = call()
        assert torch.equal(call(callback_on_step_end=show), expected)
        assert all(torch.equal(result, alone) for result in shown)
        assert run.report().warnings == ()
    # And the other way round: the plan is on the modular pipeline.
    calls = [0]
    plan = modular_plan(other, call_other)
    kind = type(modular.loop_block(other))
    original = kind.__call__

    def nesting(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        shown.append(call())
        return original(self, *args, **kwargs)

    with apply_plan(other, plan) as run:
        expected = call_other()
        shown.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, "__call__", nesting)
            assert torch.equal(call_other(), expected)
        assert len(shown) == STEPS
        assert all(torch.equal(result, uncached) for result in shown)
        assert run.report().warnings == ()


def test_a_preview_of_a_preview() -> None:
    main, call = build("QwenImagePipeline")
    _, call_second = sibling("QwenImagePipeline", main)
    _, call_third = sibling("QwenImagePipeline", main)
    alone = call_second(), call_third(size=48)
    found: list[tuple[Tensor, Tensor]] = []
    inner: list[Tensor] = []

    def innermost(pipe: Any, index: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == 1:
            inner.append(call_third(size=48))
        return kwargs

    def show(pipe: Any, index: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == 1:
            found.append((call_second(callback_on_step_end=innermost), inner[-1]))
        return kwargs

    with apply_plan(main, planned(main, call)) as run:
        expected = call()
        assert torch.equal(call(callback_on_step_end=show), expected)
    assert all(torch.equal(a, b) for a, b in zip(found[0], alone, strict=True))
    assert run.report().warnings == ()


def test_the_nearest_pipeline_on_the_stack_is_the_caller() -> None:
    pipe, call = build("WanPipeline")
    found: list[Any] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args: found.append(calling_pipeline(module))
    )
    call()
    with torch.no_grad(), contextlib.suppress(Exception):
        pipe.transformer()
    handle.remove()
    assert all(caller is pipe for caller in found[:-1])
    assert found[-1] is None


# -- a request's own copy --------------------------------------------------------------------------


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
