"""Blocks that see no timestep are computed once a generation, and nothing changes by that."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layercache.models import Adapter, BlockList, adapter_for, model_fingerprint, register_adapter
from layercache.models._foreign import CALL_SLOT
from layercache.models._table import ADAPTERS
from layercache.models.adapters import _registered, timeless_blocks
from layercache.runtime import _timeless, apply_plan
from layercache.runtime._timeless import equal
from tests.models.zoo import build
from tests.runtime.harness import LoopPipeline, group, make_plan, random_units, step, traces
from tests.runtime.pipelines import STEPS, plan_for
from tests.runtime.pipelines import build as build_pipeline

MODELS = {name: adapter for name, adapter in ADAPTERS.items() if adapter.timeless}


@pytest.fixture
def registry() -> Iterator[None]:
    """Adapters that a test registers are forgotten."""
    before = dict(_registered)
    yield
    _registered.clear()
    _registered.update(before)


def everything(pipe: Any, steps: int = STEPS) -> list[Any]:
    lists = model_fingerprint(pipe.transformer)["block_lists"]
    return [step("#" * steps), *(group(n, 0, c, "#" * steps) for n, c in lists.items())]


def blocks(pipe: Any) -> list[nn.Module]:
    return timeless_blocks(pipe.transformer, adapter_for(pipe.transformer))


# -- diffusers' models -----------------------------------------------------------------------------


def test_the_lists_are_those_of_the_models() -> None:
    assert set(MODELS) == {
        "Krea2Transformer2DModel",
        "Lumina2Transformer2DModel",
        "ZImageTransformer2DModel",
    }
    lists = {name: adapter_for(build(name)[0]).timeless for name in MODELS}
    assert lists["Krea2Transformer2DModel"] == MODELS["Krea2Transformer2DModel"].timeless
    assert lists["Lumina2Transformer2DModel"] == ("context_refiner",)
    # A list that this model lacks is left out.
    assert lists["ZImageTransformer2DModel"] == ("context_refiner",)
    omni, _ = build("ZImageTransformer2DModel", siglip_feat_dim=24)
    assert adapter_for(omni).timeless == ("context_refiner", "siglip_refiner")
    assert len(timeless_blocks(omni, adapter_for(omni))) == 2


@pytest.mark.parametrize("name", MODELS)
def test_plans_give_the_same_with_and_without(name: str, registry: None) -> None:
    pipe = LoopPipeline(*build(name))
    uncached = pipe(STEPS)
    before = traces(pipe.transformer)
    lists = model_fingerprint(pipe.transformer)["block_lists"]
    some = random_units(lists, STEPS, random.Random(name))
    results = []
    for units in (everything(pipe), some):
        with apply_plan(pipe, make_plan(pipe, STEPS, units)) as run:
            results.append(pipe(STEPS))
            assert run.held_bytes == 0
        report = run.report()
        assert report.warnings == ()
        # Once for each of the two calls a step.
        steps = units[0].cells.count("#")
        assert report.timeless_computed == 2 * len(blocks(pipe)) > 0
        assert report.timeless_reused == (steps - 1) * report.timeless_computed
        assert report.cache_bytes_seen >= report.timeless_bytes > 0
        assert f"{report.timeless_reused} reused" in str(report)
    assert torch.equal(results[0], uncached)
    register_adapter(Adapter(name, ADAPTERS[name].block_lists))
    with apply_plan(pipe, make_plan(pipe, STEPS, some)) as run:
        assert torch.equal(pipe(STEPS), results[1])
    assert run.report().timeless_computed == run.report().timeless_bytes == 0
    assert "no timestep" not in str(run.report())
    assert traces(pipe.transformer) == before


@pytest.mark.parametrize("name", ["ZImagePipeline", "Lumina2Pipeline"])
def test_pipelines_are_bit_identical(name: str) -> None:
    """Guidance in one batch a step, and in two calls; another prompt, size and number of images."""
    pipe, call = build_pipeline(name)
    other = {"prompt_embeds": torch.linspace(-1, 1, 5 * 24).reshape(1, 5, 24)}
    if name == "ZImagePipeline":
        other = {"prompt_embeds": list(other["prompt_embeds"])}  # type: ignore[dict-item]

    def changed(**more: Any) -> Tensor:
        """`call` with another prompt."""
        inner = pipe.__class__.__call__
        pipe.__class__.__call__ = lambda self, **given: inner(self, **(given | other))
        try:
            result: Tensor = call(**more)
        finally:
            pipe.__class__.__call__ = inner
        return result

    variants = [call, changed, lambda: call(images=2), lambda: call(size=48), call]
    uncached = [variant() for variant in variants]
    assert not torch.equal(uncached[0], uncached[1])
    plan = plan_for(pipe, call, everything(pipe))
    calls = plan.branches * len(blocks(pipe))
    with apply_plan(pipe, plan) as run:
        for variant, expected in zip(variants, uncached, strict=True):
            assert torch.equal(variant(), expected)
            report = run.report()
            assert report.timeless_computed == calls
            assert report.timeless_reused == (STEPS - 1) * calls
            assert run.held_bytes == 0


@pytest.mark.parametrize("name", ["ZImagePipeline", "Lumina2Pipeline"])
def test_guidance_that_ends_midway_stays_bit_identical(name: str) -> None:
    pipe, call = build_pipeline(name)
    ends = {"ZImagePipeline": "cfg_truncation", "Lumina2Pipeline": "cfg_trunc_ratio"}[name]
    uncached = call(**{ends: 0.6})
    with apply_plan(pipe, plan_for(pipe, call, everything(pipe))) as run:
        assert torch.equal(call(**{ends: 0.6}), uncached)
    assert run.report().timeless_reused > 0


def test_a_prompt_that_changes_within_a_run_is_computed_anew() -> None:
    pipe, call = build_pipeline("Lumina2Pipeline")

    def change(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": 2 * given["prompt_embeds"]} if index == 1 else {}

    more = {
        "callback_on_step_end": change,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    uncached = call(**more)
    assert not torch.equal(uncached, call())
    with apply_plan(pipe, plan_for(pipe, call, everything(pipe))) as run:
        assert torch.equal(call(**more), uncached)
    count = len(blocks(pipe))
    assert run.report().timeless_computed == (2 + 1) * count
    assert run.report().timeless_reused == (2 * STEPS - 3) * count


def test_bytes_are_those_of_arguments_and_outputs() -> None:
    pipe = LoopPipeline(*build("Lumina2Transformer2DModel"))
    sizes = 0

    def count(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal sizes
        sizes += sum(tensor.nbytes for tensor in (*args, output))

    handles = [block.register_forward_hook(count) for block in blocks(pipe)]
    pipe(1)
    for handle in handles:
        handle.remove()
    with apply_plan(pipe, make_plan(pipe, STEPS, everything(pipe))) as run:
        pipe(STEPS)
    report = run.report()
    assert report.timeless_bytes == report.cache_bytes_seen == report.cache_bytes_planned == sizes
    assert report.cache_bytes_predicted == 0


# -- what may go wrong -----------------------------------------------------------------------------


TIMESTEP = object()
"""Stands for the timestep among further arguments of a block."""


class Refiner(nn.Module):
    """Refines a text, and may write into its argument."""

    scale = 1.0
    writes = False

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, text: Tensor, *others: Any) -> Tensor:
        if self.writes:
            text += 1
        return text + self.scale * torch.tanh(self.mix(text))


class Text(nn.Module):
    """Refines a text; may write into what a block gave."""

    def __init__(self) -> None:
        super().__init__()
        self.refiner = nn.ModuleList(Refiner() for _ in range(2))
        self.writes = False

    def forward(self, text: Tensor, extra: list[Any], scale: float) -> Tensor:
        for refiner in self.refiner:
            refiner.scale = scale
            text = refiner(text, *extra)
            if self.writes:
                text *= 2
        return text


class Block(nn.Module):
    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return image + text.mean() * image.cos()


class Model(nn.Module):
    """Refines a text, then an image by it; blocks get the arguments that a test wants besides."""

    def __init__(self) -> None:
        super().__init__()
        self.text = Text()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.extra: tuple[Any, ...] = ()

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> tuple[Tensor]:
        seen = encoder_hidden_states.clone()
        extra = [timestep if value is TIMESTEP else value for value in self.extra]
        scale = 1.0 if attention_kwargs is None else attention_kwargs["scale"]
        text = self.text(seen, extra, scale)
        for block in self.blocks:
            hidden_states = block(hidden_states, text + seen)
        return (hidden_states * timestep,)


class Loop(LoopPipeline):
    """Whose arguments a test may change by step."""

    def change(self, sigma: float, given: dict[str, Any]) -> None:
        """Changes nothing."""

    def arguments(self, sigma: float, latent: Tensor | None, branch: str) -> dict[str, Any]:
        given = super().arguments(sigma, latent, branch)
        self.change(sigma, given)
        return given


@pytest.fixture
def pipe(registry: None) -> Loop:
    listed = BlockList("blocks", streams=("image",), outputs=("image",))
    register_adapter(Adapter("Model", (listed,), ("text.refiner", "text.missing", "none.at.all")))
    torch.manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 6, 4),
        "encoder_hidden_states": torch.randn(1, 3, 4),
        "timestep": torch.tensor(1.0),
    }
    return Loop(Model().eval(), inputs)


def reused(pipe: Loop, steps: int = 4) -> int:
    """How many calls were answered in a run that must be bit-identical."""
    uncached = pipe(steps)
    with apply_plan(pipe, make_plan(pipe, steps, everything(pipe, steps))) as run:
        for _ in range(2):
            assert torch.equal(pipe(steps), uncached)
            assert run.held_bytes == 0
    report = run.report()
    assert report.warnings == ()
    return report.timeless_reused


def test_a_block_runs_once_a_generation_for_each_call_of_a_step(pipe: Loop) -> None:
    called: Counter[nn.Module] = Counter()
    for refiner in blocks(pipe):
        refiner.register_forward_hook(lambda module, args, output: called.update([module]))
    with apply_plan(pipe, make_plan(pipe, 4, everything(pipe, 4))):
        for run in range(2):
            pipe(4)
            assert list(called.values()) == [2 * (run + 1)] * 2
    assert all(vars(refiner).get(CALL_SLOT) is None for refiner in blocks(pipe))


def test_changed_arguments_compute_anew(pipe: Loop) -> None:
    def change(sigma: float, given: dict[str, Any]) -> None:
        given["encoder_hidden_states"] = given["encoder_hidden_states"].clone()
        if sigma < 0.5:
            given["encoder_hidden_states"][0, -1, -1] += 1e-6

    pipe.change = change  # type: ignore[method-assign]
    # Four steps with one change make two computations, of which each branch and block has one.
    assert reused(pipe) == (4 - 2) * 2 * 2


def test_a_model_that_writes_into_what_a_block_gave(pipe: Loop) -> None:
    pipe.transformer.text.writes = True
    assert reused(pipe) == 3 * 2 * 2


def test_a_prompt_that_is_written_over(pipe: Loop) -> None:
    """The same tensor, with something else in it."""
    held = torch.zeros_like(pipe.inputs["encoder_hidden_states"])

    def change(sigma: float, given: dict[str, Any]) -> None:
        held.copy_(given["encoder_hidden_states"] * (2 if sigma < 0.5 else 1))
        given["encoder_hidden_states"] = held

    pipe.change = change  # type: ignore[method-assign]
    assert reused(pipe) == (4 - 2) * 2 * 2


def test_a_block_that_writes_into_its_argument_is_always_computed(
    pipe: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Refiner, "writes", True)
    assert reused(pipe) == 0


@pytest.mark.parametrize("extra", [TIMESTEP, object(), torch.tensor(float("nan"))])
def test_what_is_another_or_cannot_be_compared_is_computed(pipe: Loop, extra: Any) -> None:
    pipe.transformer.extra = (extra,)
    assert reused(pipe) == 0


def test_plain_and_nested_arguments_are_compared(pipe: Loop) -> None:
    pipe.transformer.extra = (None, 3, {"mask": [torch.ones(2, dtype=torch.bool)]}, (0.5, "auto"))
    assert reused(pipe) == 3 * 2 * 2


def test_another_lora_scale_is_another_block(pipe: Loop) -> None:
    def change(sigma: float, given: dict[str, Any]) -> None:
        given["attention_kwargs"] = {"scale": 0.5 if sigma < 0.5 else 1.0}

    pipe.change = change  # type: ignore[method-assign]
    assert reused(pipe) == (4 - 2) * 2 * 2


def test_blocks_in_training_are_computed(pipe: Loop) -> None:
    blocks(pipe)[0].train()
    assert reused(pipe) == 3 * 2


def test_inference_mode_and_another_dtype_midway(pipe: Loop) -> None:
    def change(sigma: float, given: dict[str, Any]) -> None:
        if sigma < 0.5:
            pipe.transformer.double()
            given.update({k: v.double() for k, v in given.items() if isinstance(v, Tensor)})
        else:
            pipe.transformer.float()

    with torch.inference_mode():
        assert reused(pipe) == 3 * 2 * 2
    pipe.change = change  # type: ignore[method-assign]
    uncached = pipe(4)
    with apply_plan(pipe, make_plan(pipe, 4, [step("####")])) as run:
        assert torch.equal(pipe(4), uncached)
    assert run.report().timeless_computed == 2 * 2 * 2


def test_with_gradients_nothing_is_stored(pipe: Loop) -> None:
    with apply_plan(pipe, make_plan(pipe, 4, everything(pipe, 4))) as run:
        with pytest.warns(UserWarning, match="gradients are enabled"):
            pipe.transformer(**pipe.inputs)[0].sum().backward()
        assert all(refiner.mix.weight.grad is not None for refiner in blocks(pipe))
        assert run.held_bytes == 0


def test_processes_of_one_run_do_not_decide_by_data(
    pipe: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_timeless, "_several_processes", lambda: True)
    assert reused(pipe) == 0


def test_a_run_that_is_broken_off_or_changes_its_model_keeps_nothing(pipe: Loop) -> None:
    uncached = pipe(4)
    with apply_plan(pipe, make_plan(pipe, 4, everything(pipe, 4))) as run:
        pipe(4, leave_at=2)
        assert run.held_bytes == 0
        assert torch.equal(pipe(4), uncached)

        def fail(sigma: float, given: dict[str, Any]) -> None:
            assert run.held_bytes > 0 or sigma == 1.0
            if sigma < 0.5:
                raise KeyboardInterrupt

        pipe.change = fail  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            pipe(4)
        assert run.held_bytes == 0
    assert all(vars(refiner).get(CALL_SLOT) is None for refiner in blocks(pipe))


def test_a_run_that_is_computed_in_full_stores_nothing(pipe: Loop) -> None:
    uncached = pipe(5)
    plan = make_plan(pipe, 4, everything(pipe, 4))
    with (
        apply_plan(pipe, plan, on_mismatch="compute") as run,
        pytest.warns(UserWarning, match="computed in full"),
    ):
        assert torch.equal(pipe(5), uncached)
        assert run.report().timeless_computed == run.held_bytes == 0
        with run.off():
            pipe(4)
        assert run.report().timeless_computed == run.held_bytes == 0


# -- compiling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["the model", "the part", "the blocks"])
@pytest.mark.parametrize("plan_first", [True, False], ids=["plan, compile", "compile, plan"])
def test_compiled_modules_run_as_they_did(pipe: Loop, what: str, plan_first: bool) -> None:
    torch._dynamo.reset()
    uncached = pipe(4)
    model: Any = pipe.transformer
    modules = {"the model": [model], "the part": [model.text], "the blocks": model.text.refiner}
    plan = make_plan(pipe, 4, [step("####")])

    def compile_them() -> None:
        for module in modules[what]:
            module.compile(backend="eager", fullgraph=True)

    if not plan_first:
        compile_them()
    with apply_plan(pipe, plan) as run:
        if plan_first:
            compile_them()
        torch.testing.assert_close(pipe(4), uncached)
        # Another graph would be an error from here on, with the plan or without.
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(pipe(4), uncached)
            report = run.report()
            run.remove()
            torch.testing.assert_close(pipe(4), uncached)
    # What is compiled as one goes round the gates inside.
    assert report.timeless_reused == (12 if what == "the blocks" else 0)
    torch._dynamo.reset()


# -- comparing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.ones(2), torch.zeros(2)),
        (torch.ones(2), torch.ones(2, 1)),
        (torch.ones(2), torch.ones(2).double()),
        (torch.ones(2), nn.Parameter(torch.ones(2))),
        (torch.ones(2, device="meta"), torch.ones(2, device="meta")),
        (torch.tensor(float("nan")), torch.tensor(float("nan"))),
        (1, True),
        ([1], (1,)),
        ([1], [1, 2]),
        ({"a": 1}, {"b": 1}),
        (object, object),
    ],
)
def test_what_is_not_alike(one: Any, other: Any) -> None:
    assert not equal(one, other)


@pytest.mark.parametrize(
    "value",
    [
        None, 1.5, "text", torch.float16, torch.device("cpu"), torch.ones(2, dtype=torch.complex64),
        ((torch.ones(1), None), {"a": [torch.zeros(2, dtype=torch.bool)]}),
    ],
)  # fmt: skip
def test_what_is_alike(value: Any) -> None:
    assert equal(value, value)
