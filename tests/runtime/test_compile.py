"""Compiled blocks under a plan: nothing is compiled again, and no graph breaks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from layercache.errors import ModelMismatchError, UnsupportedModelError
from layercache.runtime import apply_plan, compile_blocks
from tests.models.zoo import build
from tests.runtime.harness import LoopPipeline, group, make_plan, step
from tests.runtime.mixed import LIST, MIXED, STEPS, pipeline


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("compile_first", [True, False], ids=["compile, plan", "plan, compile"])
def test_compiled_blocks_never_compile_again(compile_first: bool) -> None:
    pipe = pipeline()
    plan = make_plan(pipe, STEPS, MIXED)
    other = make_plan(pipe, STEPS, [group(LIST, 1, 4, "##0101")])
    with apply_plan(pipe, plan):
        expected = pipe(STEPS)
    with apply_plan(pipe, other):
        expected_of_other = pipe(STEPS)
    if compile_first:
        assert compile_blocks(pipe.transformer, backend="eager", fullgraph=True) == 4
    run = apply_plan(pipe, plan)
    if not compile_first:
        assert compile_blocks(pipe.transformer, backend="eager", fullgraph=True) == 4
    assert torch.allclose(pipe(STEPS), expected, atol=1e-5)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs >= 1
    # From here on any recompilation raises.
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.allclose(pipe(STEPS), expected, atol=1e-5)
        assert run.report().warnings == ()
        run.remove()
        with apply_plan(pipe, other) as run:
            assert torch.allclose(pipe(STEPS), expected_of_other, atol=1e-5)
        assert run.report().warnings == ()
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def test_diffusers_regional_compilation_is_kept() -> None:
    pipe = pipeline()
    plan = make_plan(pipe, STEPS, MIXED)
    with apply_plan(pipe, plan):
        expected = pipe(STEPS)
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    with apply_plan(pipe, plan) as run:
        assert torch.allclose(pipe(STEPS), expected, atol=1e-5)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.allclose(pipe(STEPS), expected, atol=1e-5)
        assert run.report().warnings == ()
    # One graph for the first block, and none for the others, which are alike.
    assert counters["stats"]["unique_graphs"] <= 2
    assert not counters["graph_break"]


def test_blocks_compiled_after_the_plan_are_taken_up() -> None:
    pipe = pipeline()
    plan = make_plan(pipe, STEPS, MIXED)
    run = apply_plan(pipe, plan)
    expected = pipe(STEPS)
    calls = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal calls
        calls += 1
        return graph.forward

    for block in pipe.transformer.transformer_blocks:
        block.compile(backend=backend)
    assert torch.allclose(pipe(STEPS), expected, atol=1e-5)
    assert calls > 0
    assert run.report().warnings == ()
    run.remove()
    blocks = pipe.transformer.transformer_blocks
    assert all(block._compiled_call_impl is not None for block in blocks)


def test_a_model_compiled_as_a_whole_takes_the_step_unit_only() -> None:
    # One block, since compiling is what takes the time here.
    pipe = LoopPipeline(*build("QwenImageTransformer2DModel", num_layers=1))
    eager = pipe.transformer
    with_groups = make_plan(pipe, STEPS, [group(LIST, 0, 1, "##1###")])
    only_step = make_plan(pipe, STEPS, [step("##0#00")])
    with apply_plan(pipe, only_step):
        expected = pipe(STEPS)
    pipe.transformer = torch.compile(eager, backend="eager")
    with pytest.raises(UnsupportedModelError, match="compile_blocks"):
        apply_plan(pipe, with_groups)
    with apply_plan(pipe, only_step) as run:
        assert torch.allclose(pipe(STEPS), expected, atol=1e-5)
    assert run.report().warnings == ()


@pytest.mark.parametrize("how", ["module", "pipeline"])
def test_compiling_the_whole_model_under_a_plan_is_explained(how: str) -> None:
    pipe = LoopPipeline(*build("QwenImageTransformer2DModel", num_layers=1))
    with apply_plan(pipe, make_plan(pipe, STEPS, [group(LIST, 0, 1, "##1###")])):
        if how == "module":
            pipe.transformer.compile(backend="eager")
            with pytest.raises(UnsupportedModelError, match="compiled as a whole while a plan"):
                pipe(STEPS)
        else:
            pipe.transformer = torch.compile(pipe.transformer, backend="eager")
            with pytest.raises(ModelMismatchError, match="transformer was replaced"):
                pipe(STEPS)


def test_a_model_compiled_under_a_plan_of_whole_steps_keeps_it() -> None:
    pipe = LoopPipeline(*build("QwenImageTransformer2DModel", num_layers=1))
    with apply_plan(pipe, make_plan(pipe, STEPS, [step("##0#00")])) as run:
        expected = pipe(STEPS)
        pipe.transformer.compile(backend="eager")
        # The gate at the root is taken back at the scheduler's first step.
        pipe(STEPS)
        assert torch.allclose(pipe(STEPS), expected, atol=1e-5)
        assert run.report().warnings == ()
