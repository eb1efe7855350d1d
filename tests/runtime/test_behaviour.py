"""What the runtime does when it is put on, taken off, misused, interrupted or compiled."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry
from diffusers.hooks import ModelHook as DiffusersHook
from diffusers.hooks.context_parallel import _CONTEXT_PARALLEL_INPUT_HOOK_TEMPLATE
from torch import nn
from torch._dynamo.utils import counters

from layercache.errors import (
    LayerCacheError,
    ModelMismatchError,
    PlanError,
    UnsupportedModelError,
)
from layercache.models import Adapter, BlockList, register_adapter
from layercache.models.adapters import _registered
from layercache.runtime import apply_plan, compile_blocks
from layercache.runtime import run as run_module
from layercache.runtime.arithmetic import add, difference, predict
from tests.models.zoo import build
from tests.runtime.harness import LoopPipeline, group, make_plan, step, traces

STEPS = 6
LIST = "transformer_blocks"
MIXED = [
    step("###1##", (0.0, 0.0, 0.2, 0.7, 0.0, 0.1)),
    group(LIST, 0, 2, "##1.0#"),
    group(LIST, 2, 4, "##0.#1"),
]


def pipeline(seed: int = 0) -> LoopPipeline:
    return LoopPipeline(*build("QwenImageTransformer2DModel", seed))


def tensors() -> int:
    gc.collect()
    return sum(1 for thing in gc.get_objects() if type(thing) is torch.Tensor)


# -- putting on and taking off ------------------------------------------------------------------


def test_a_failed_installation_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline()
    pipe(1)
    before = traces(pipe.transformer)

    def broken(*_: Any) -> None:
        raise RuntimeError("no tap")

    monkeypatch.setattr(run_module, "tap_step", broken)
    with pytest.raises(RuntimeError, match="no tap"):
        apply_plan(pipe, make_plan(pipe, STEPS, MIXED))
    assert traces(pipe.transformer) == before


def test_a_second_plan_on_one_transformer_is_refused() -> None:
    pipe = pipeline()
    plan = make_plan(pipe, STEPS, MIXED)
    words = r"a plan is on this QwenImage\w* already"
    with apply_plan(pipe, plan), pytest.raises(LayerCacheError, match=words):
        apply_plan(pipe, plan)
    with apply_plan(pipe, plan) as run:
        assert run.active
    assert not run.active


def test_a_plan_for_another_model_is_refused() -> None:
    pipe = pipeline()
    plan = make_plan(pipe, STEPS, MIXED)
    other = LoopPipeline(*build("QwenImageTransformer2DModel", attention_head_dim=32,
                                axes_dims_rope=(8, 12, 12)))  # fmt: skip
    with pytest.raises(ModelMismatchError, match="architecture"):
        apply_plan(other, plan)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"plan": "plan.json"}, PlanError, "read a file with Plan.load"),
        ({"component": "unet"}, UnsupportedModelError, "no module 'unet'"),
        ({"on_mismatch": "ignore"}, LayerCacheError, '"error" or "compute"'),
    ],
)
def test_misuse_is_explained(
    change: dict[str, Any], error: type[LayerCacheError], words: str
) -> None:
    pipe = pipeline()
    arguments: dict[str, Any] = {"plan": make_plan(pipe, STEPS, MIXED)} | change
    with pytest.raises(error, match=words):
        apply_plan(pipe, **arguments)


def test_another_setting_gives_one_warning() -> None:
    pipe = pipeline()
    setting = {"scheduler": "UniPCMultistepScheduler", "dtype": "bfloat16"}
    plan = make_plan(pipe, STEPS, MIXED, setting=setting)
    with pytest.warns(UserWarning, match=r"scheduler is .*; dtype is") as caught:
        apply_plan(pipe, plan).remove()
    assert len(caught) == 1


# -- the schedule ---------------------------------------------------------------------------------


def test_another_schedule_is_an_error() -> None:
    pipe = pipeline()
    with apply_plan(pipe, make_plan(pipe, STEPS, MIXED)):
        with pytest.raises(ModelMismatchError, match="it has 4 steps and the plan 6"):
            pipe(4)
        # The plan is still good for a run that follows its schedule.
        pipe(STEPS)


def test_another_schedule_can_be_computed_in_full() -> None:
    pipe = pipeline()
    expected = pipe(4)
    plan = make_plan(pipe, STEPS, MIXED)
    with apply_plan(pipe, plan, on_mismatch="compute") as run:
        with pytest.warns(UserWarning, match="computed in full") as caught:
            assert torch.equal(pipe(4), expected)
            assert torch.equal(pipe(4), expected)
        assert len(caught) == 1
        assert any("another noise schedule" in w for w in run.report().warnings)


def test_a_replaced_scheduler_is_an_error() -> None:
    pipe = pipeline()
    with apply_plan(pipe, make_plan(pipe, STEPS, MIXED)):
        pipe.scheduler = type(pipe.scheduler)(shift=3.0)
        with pytest.raises(ModelMismatchError, match="scheduler was replaced"):
            pipe(STEPS)


def test_a_run_that_starts_late_computes_what_it_cannot_predict() -> None:
    pipe = pipeline()
    with apply_plan(pipe, make_plan(pipe, STEPS, [step("###000")])) as run:
        result = pipe(STEPS, start=3)
    assert run.report().warnings[0] == ("step: what step 3 predicts from was not stored (2 times)")
    assert torch.equal(result, pipe(STEPS, start=3))


# -- branches -------------------------------------------------------------------------------------


def test_branches_are_told_apart_without_cache_contexts() -> None:
    pipe = pipeline()
    with apply_plan(pipe, make_plan(pipe, STEPS, MIXED)) as run:
        named = pipe(STEPS)
        assert set(run.report().units[0].seen_computed) == {"cond", "uncond"}
        pipe.named = False
        assert torch.equal(pipe(STEPS), named)
        assert set(run.report().units[0].seen_computed) == {"call 0", "call 1"}


def test_one_call_a_step() -> None:
    pipe = pipeline()
    pipe.guided = False
    with apply_plan(pipe, make_plan(pipe, STEPS, MIXED)) as run:
        assert pipe(STEPS).isfinite().all()
    assert run.report().warnings == ()


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "units",
    [
        MIXED,
        [step("##0000")],
        [group(LIST, 0, 4, "##1###")],
        [group(LIST, i, i + 1, "###212") for i in range(4)],
    ],
    ids=["mixed", "step", "one group", "a group a block"],
)
def test_cache_bytes_are_those_of_the_plan_and_all_are_freed(units: Any) -> None:
    pipe = pipeline()
    plan = make_plan(pipe, STEPS, units)
    pipe(STEPS)
    count = tensors()
    with apply_plan(pipe, plan) as run:
        pipe(STEPS)
        report = run.report()
        assert report.cache_bytes_seen == report.cache_bytes_planned > 0
        assert run._held_bytes() == 0
        del report
    del run
    assert tensors() == count


def test_an_exception_frees_everything() -> None:
    pipe = pipeline()
    with apply_plan(pipe, make_plan(pipe, STEPS, MIXED)) as run:
        pipe(STEPS)
        expected = pipe(STEPS)
        calls = 0

        def failing(*_: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 4:
                raise KeyboardInterrupt

        handle = pipe.transformer.transformer_blocks[3].register_forward_pre_hook(failing)
        with pytest.raises(KeyboardInterrupt):
            pipe(STEPS)
        handle.remove()
        assert run._held_bytes() == 0
        assert torch.equal(pipe(STEPS), expected)


def test_nothing_is_kept_under_grad_mode() -> None:
    pipe = pipeline()
    inputs = pipe.arguments(0.5, None, "cond")
    with apply_plan(pipe, make_plan(pipe, STEPS, MIXED)) as run:
        with pytest.warns(UserWarning, match="gradients are enabled"):
            output = pipe.transformer(**inputs, return_dict=False)[0]
        output.sum().backward()
        assert run._held_bytes() == 0
    assert next(pipe.transformer.parameters()).grad is not None


def test_inference_mode_works() -> None:
    pipe = pipeline()
    with apply_plan(pipe, make_plan(pipe, STEPS, MIXED)) as run:
        expected = pipe(STEPS)
        with torch.inference_mode():
            assert torch.allclose(LoopPipeline.__call__.__wrapped__(pipe, STEPS), expected)
        assert run.report().warnings == ()


# -- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fifty_steps_of_reuse_stay_finite(dtype: torch.dtype) -> None:
    model, inputs = build("QwenImageTransformer2DModel")
    model.to(dtype)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            inputs[name] = value.to(dtype)
    # Large hidden states, as large models have them.
    model.img_in.weight.data *= 1e3
    pipe = LoopPipeline(model, inputs)
    assert pipe(2).isfinite().all()
    units = [group(LIST, 0, 4, "##" + "1" * 48, [0.0, 0.0] + [1.5] * 48)]
    with apply_plan(pipe, make_plan(pipe, 50, units)):
        assert pipe(50).isfinite().all()


def test_half_precision_saturates_and_does_not_overflow() -> None:
    large = torch.tensor([60000.0, -60000.0], dtype=torch.float16)
    end = torch.finfo(torch.float16).max
    saturated = torch.tensor([end, -end], dtype=torch.float16)
    assert torch.equal(predict(large, -large, 1.5), saturated)
    assert torch.equal(difference(large, -large), saturated)
    assert torch.equal(add(large, large), saturated)


def test_a_prediction_is_linear_in_the_weight() -> None:
    anchor, base = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 3.0])
    assert predict(anchor, base, 0.0) is anchor
    assert predict(anchor, None, 0.5) is anchor
    for weight in (-2.0, -0.7, 0.25, 3.0):
        torch.testing.assert_close(predict(anchor, base, weight), anchor + weight * (anchor - base))


# -- composition ----------------------------------------------------------------------------------


class Counting(ModelHook):
    """An accelerate hook that counts the calls it sees."""

    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("hook_first", [True, False])
def test_forward_hooks_come_and_go_inside_the_gates(hook_first: bool) -> None:
    pipe = pipeline()
    plan = make_plan(pipe, STEPS, [step("##0#00"), group(LIST, 0, 4, "##.#..")])
    with apply_plan(pipe, plan):
        expected = pipe(STEPS)
    hook = Counting()
    if hook_first:
        add_hook_to_module(pipe.transformer, hook)
    run = apply_plan(pipe, plan)
    if not hook_first:
        add_hook_to_module(pipe.transformer, hook)
    assert torch.equal(pipe(STEPS), expected)
    # A skipped call skips what offloading would do for it.
    assert hook.calls == 3 * 2
    remove_hook_from_module(pipe.transformer)
    assert torch.equal(pipe(STEPS), expected)
    assert run.report().warnings == ()
    run.remove()


class Split(DiffusersHook):
    """Stands where diffusers' context parallelism splits a block's inputs."""


def test_a_group_where_the_sequence_is_split_is_refused() -> None:
    pipe = pipeline()
    first = pipe.transformer.transformer_blocks[0]
    HookRegistry.check_if_exists_or_initialize(first).register_hook(
        Split(), _CONTEXT_PARALLEL_INPUT_HOOK_TEMPLATE.format("transformer_blocks.0")
    )
    with pytest.raises(UnsupportedModelError, match="begin the group one block later"):
        apply_plan(pipe, make_plan(pipe, STEPS, [group(LIST, 0, 4, "##1###")]))
    with apply_plan(pipe, make_plan(pipe, STEPS, [group(LIST, 1, 4, "##1###")])) as run:
        pipe(STEPS)
    assert run.report().warnings == ()


def test_changing_adapters_drops_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline()
    monkeypatch.setattr(
        type(pipe.transformer), "set_adapters", lambda self, *a, **k: None, raising=False
    )
    original = pipe.scheduler.step
    plan = make_plan(pipe, STEPS, [step("##0000")])
    with apply_plan(pipe, plan) as run:
        tapped = pipe.scheduler.step

        def changing(*args: Any, **kwargs: Any) -> Any:
            result = tapped(*args, **kwargs)
            if pipe.scheduler._step_index == 4:
                pipe.transformer.set_adapters("other")
            return result

        pipe.scheduler.step = changing
        pipe(STEPS)
        pipe.scheduler.step = tapped
        assert run.report().units[0].seen_predicted == {"cond": 2, "uncond": 2}
    assert pipe.scheduler.step == original
    assert "set_adapters" not in vars(pipe.transformer)


def test_compiled_blocks_keep_eager_gates() -> None:
    pipe = pipeline()
    plan = make_plan(pipe, STEPS, MIXED)
    with apply_plan(pipe, plan):
        expected = pipe(STEPS)
    torch._dynamo.reset()
    counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert compile_blocks(pipe.transformer, backend="eager", fullgraph=True) == 4
        pipe(2)
        graphs = counters["stats"]["unique_graphs"]
        assert graphs >= 1
        with apply_plan(pipe, plan) as run:
            assert torch.allclose(pipe(STEPS), expected, atol=1e-5)
            assert torch.allclose(pipe(STEPS), expected, atol=1e-5)
        assert run.report().warnings == ()
        assert counters["stats"]["unique_graphs"] == graphs
        assert not counters["graph_break"]
    torch._dynamo.reset()


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

    torch._dynamo.reset()
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend=backend)
    assert torch.allclose(pipe(STEPS), expected, atol=1e-5)
    assert calls > 0
    assert run.report().warnings == ()
    run.remove()
    blocks = pipe.transformer.transformer_blocks
    assert all(block._compiled_call_impl is not None for block in blocks)
    torch._dynamo.reset()


def test_a_model_compiled_as_a_whole_takes_the_step_unit_only() -> None:
    # One block, since compiling is what takes the time here.
    pipe = LoopPipeline(*build("QwenImageTransformer2DModel", num_layers=1))
    eager = pipe.transformer
    with_groups = make_plan(pipe, STEPS, [group(LIST, 0, 1, "##1###")])
    only_step = make_plan(pipe, STEPS, [step("##0#10")])
    with apply_plan(pipe, only_step):
        expected = pipe(STEPS)
    torch._dynamo.reset()
    pipe.transformer = torch.compile(eager, backend="eager")
    with pytest.raises(UnsupportedModelError, match="compile_blocks"):
        apply_plan(pipe, with_groups)
    with apply_plan(pipe, only_step) as run:
        assert torch.allclose(pipe(STEPS), expected, atol=1e-5)
    assert run.report().warnings == ()
    torch._dynamo.reset()


# -- models of third parties ----------------------------------------------------------------------


class Block(nn.Module):
    """A block whose stream has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, tokens: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return tokens + scale * torch.tanh(self.mix(tokens))


class HomeMade(nn.Module):
    """A transformer that is not from diffusers."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Block() for _ in range(3))

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True
    ):
        for block in self.stages:
            hidden_states = block(hidden_states, timestep)
        return (hidden_states,)


def test_a_registered_adapter_is_enough() -> None:
    torch.manual_seed(0)
    inputs = {"hidden_states": torch.randn(2, 4, 8), "timestep": torch.tensor(1.0)}
    pipe = LoopPipeline(HomeMade(), inputs, guided=False)
    before = dict(_registered)
    with pytest.raises(UnsupportedModelError, match="no adapter knows HomeMade"):
        make_plan(pipe, 3, [])
    try:
        stages = BlockList("stages", streams=("tokens",), outputs=("tokens",))
        register_adapter(Adapter("HomeMade", (stages,)))
        with apply_plan(pipe, make_plan(pipe, 3, [group("stages", 0, 3, "##1")])) as run:
            assert pipe(3).isfinite().all()
        assert run.report().warnings == ()
        wrong = BlockList("stages", streams=("hidden_states",), outputs=("hidden_states",))
        register_adapter(Adapter("HomeMade", (wrong,)))
        with pytest.raises(UnsupportedModelError, match="takes no argument 'hidden_states'"):
            apply_plan(pipe, make_plan(pipe, 3, [group("stages", 0, 3, "##1")]))
    finally:
        _registered.clear()
        _registered.update(before)
