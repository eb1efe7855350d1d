"""One transformer, several pipelines, one inside the other.

Oracle: the same pipeline by itself, with no plan on, or with the plan on and nothing else.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from layercache.models.calling import calling_pipeline
from layercache.runtime import apply_plan
from tests.runtime import modular
from tests.runtime.harness import group, step
from tests.runtime.pipelines import STEPS, build, plan_for, planned

NAMES = ["QwenImagePipeline", "StableDiffusion3Pipeline", "WanPipeline", "FluxPipeline"]


class Stop(Exception):
    """Raised in the middle of a run."""


def sibling(name: str, pipe: Any) -> tuple[Any, Any]:
    """Another pipeline, with a scheduler of its own, around the transformer of the first."""
    other, call = build(name)
    other.transformer = pipe.transformer
    return other, call


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
    plan = modular.plan_of(other, call_other)
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
