"""Weights that are elsewhere between calls, and blocks on several devices."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    add_hook_to_module,
    remove_hook_from_module,
)
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from torch import Tensor, nn

from layercache.models import model_fingerprint
from layercache.plan import UnitPlan
from layercache.runtime import apply_plan
from layercache.runtime.arithmetic import add
from tests.models.zoo import build
from tests.runtime.harness import LoopPipeline, group, make_plan, random_units, step
from tests.runtime.mixed import LIST, MIXED, STEPS, pipeline


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


# -- group offloading ------------------------------------------------------------------------------

# Cuts of the plan inside and at the borders of offload groups of two blocks.
CUTS: dict[str, Sequence[UnitPlan]] = {
    "along": [group(LIST, 0, 2, "##0101"), group(LIST, 2, 4, "##1#00")],
    "across": [group(LIST, 1, 3, "##0101")],
    "leader predicted": [group(LIST, 0, 1, "##0000"), group(LIST, 2, 3, "##0101")],
    "alternating": [group(LIST, 0, 1, "##0#0#"), group(LIST, 1, 2, "###0#0"),
                    group(LIST, 2, 3, "##0#0#"), group(LIST, 3, 4, "###0#0")],
    "mixed": MIXED,
}  # fmt: skip


@pytest.fixture
def lost_weights(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Weights that are offloaded to disk become NaN in memory, so that none is used unloaded."""
    counts = {"loads": 0}
    offload, onload = ModuleGroup.offload_, ModuleGroup.onload_

    def offload_(self: ModuleGroup) -> None:
        offload(self)
        for tensor in self.tensor_to_key:
            tensor.data.fill_(float("nan"))

    def onload_(self: ModuleGroup) -> None:
        counts["loads"] += 1
        onload(self)

    monkeypatch.setattr(ModuleGroup, "offload_", offload_)
    monkeypatch.setattr(ModuleGroup, "onload_", onload_)
    return counts


def offload(model: nn.Module, folder: Path, **how: Any) -> None:
    apply_group_offloading(
        model, onload_device="cpu", offload_device="cpu", offload_to_disk_path=str(folder), **how
    )


LEVELS = {
    "blocks": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "pairs": {"offload_type": "block_level", "num_blocks_per_group": 2},
    "all blocks": {"offload_type": "block_level", "num_blocks_per_group": 4},
    "leaves": {"offload_type": "leaf_level"},
}


@pytest.mark.parametrize("plan_first", [True, False], ids=["plan, offload", "offload, plan"])
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("level", LEVELS)
def test_group_offloading(
    level: str, cuts: str, plan_first: bool, tmp_path: Path, lost_weights: dict[str, int]
) -> None:
    pipe = pipeline()
    plan = make_plan(pipe, STEPS, CUTS[cuts])
    uncached = pipe(STEPS)
    with apply_plan(pipe, plan):
        expected = pipe(STEPS)
    if not plan_first:
        offload(pipe.transformer, tmp_path, **LEVELS[level])
    run = apply_plan(pipe, plan)
    if plan_first:
        offload(pipe.transformer, tmp_path, **LEVELS[level])
    for _ in range(2):
        lost_weights["loads"] = 0
        assert torch.equal(pipe(STEPS), expected)
        assert run.report().warnings == ()
    planned = lost_weights["loads"]
    run.remove()
    lost_weights["loads"] = 0
    assert torch.equal(pipe(STEPS), uncached)
    if level != "all blocks":
        # What is skipped is not loaded, unless a computed block of the same offload group needs it.
        whole = level == "pairs" and cuts in ("across", "leader predicted", "alternating")
        assert planned == lost_weights["loads"] if whole else planned < lost_weights["loads"]
    for block in pipe.transformer.transformer_blocks:
        assert all(p.isnan().all() for p in block.parameters())


@pytest.mark.parametrize(
    "name",
    ["FluxTransformer2DModel", "WanTransformer3DModel", "SD3Transformer2DModel",
     "ZImageTransformer2DModel"],
)  # fmt: skip
def test_group_offloading_of_other_models(
    name: str, tmp_path: Path, lost_weights: dict[str, int]
) -> None:
    pipe = LoopPipeline(*build(name))
    lists = model_fingerprint(pipe.transformer)["block_lists"]
    plan = make_plan(pipe, STEPS, random_units(lists, STEPS, random.Random(name), with_step=False))
    with apply_plan(pipe, plan):
        expected = pipe(STEPS)
    offload(pipe.transformer, tmp_path, **LEVELS["pairs"])
    with apply_plan(pipe, plan) as run:
        assert torch.equal(pipe(STEPS), expected)
    assert run.report().warnings == ()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["Lumina2Transformer2DModel", "ZImageTransformer2DModel"])
def test_group_offloading_of_blocks_that_see_no_timestep(
    name: str, level: str, tmp_path: Path, lost_weights: dict[str, int]
) -> None:
    layers = "n_refiner_layers" if name.startswith("Z") else "num_refiner_layers"
    pipe = LoopPipeline(*build(name, **{layers: 2}))
    uncached = pipe(STEPS)
    plan = make_plan(pipe, STEPS, [step("#" * STEPS)])
    offload(pipe.transformer, tmp_path, **LEVELS[level])
    lost_weights["loads"] = 0
    assert torch.equal(pipe(STEPS), uncached)
    loads = lost_weights["loads"]
    with apply_plan(pipe, plan) as run:
        for _ in range(2):
            lost_weights["loads"] = 0
            assert torch.equal(pipe(STEPS), uncached)
            assert run.report().timeless_reused == 2 * 2 * (STEPS - 1)
    # A block is loaded all the same where the next one of its offload group may be computed.
    shared = level in ("pairs", "all blocks")
    assert lost_weights["loads"] == loads if shared else lost_weights["loads"] < loads


# -- accelerate ------------------------------------------------------------------------------------


def sequential(model: nn.Module) -> None:
    """What `enable_sequential_cpu_offload` does: weights are on `meta` between calls."""
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def whole(model: nn.Module) -> None:
    """What `enable_model_cpu_offload` does, with the CPU in the place of the accelerator."""
    accelerate.cpu_offload_with_hook(model, torch.device("cpu"))


@pytest.mark.parametrize("plan_first", [True, False], ids=["plan, offload", "offload, plan"])
@pytest.mark.parametrize("how", [sequential, whole])
def test_accelerate_offloading(how: Callable[[nn.Module], None], plan_first: bool) -> None:
    pipe = pipeline()
    plan = make_plan(pipe, STEPS, MIXED)
    uncached = pipe(STEPS)
    with apply_plan(pipe, plan):
        expected = pipe(STEPS)
    if not plan_first:
        how(pipe.transformer)
    run = apply_plan(pipe, plan)
    if plan_first:
        how(pipe.transformer)
    assert torch.equal(pipe(STEPS), expected)
    if how is sequential:
        assert all(p.device.type == "meta" for p in pipe.transformer.parameters())
    assert torch.equal(pipe(STEPS), expected)
    assert run.report().warnings == ()
    # As pipelines do at the end of a call (`maybe_free_model_hooks`).
    remove_hook_from_module(pipe.transformer, recurse=True)
    if how is whole:
        how(pipe.transformer)
        assert torch.equal(pipe(STEPS), expected)
    run.remove()
    remove_hook_from_module(pipe.transformer, recurse=True)
    assert torch.equal(pipe(STEPS), uncached)


def test_a_device_map_with_blocks_on_disk(tmp_path: Path) -> None:
    pipe = pipeline()
    plan = make_plan(pipe, STEPS, MIXED)
    with apply_plan(pipe, plan):
        expected = pipe(STEPS)
    names = [name for name, _ in pipe.transformer.named_children() if name != LIST]
    places: dict[str, Any] = dict.fromkeys(names, "cpu")
    places |= {f"{LIST}.{i}": "cpu" if i % 2 else "disk" for i in range(4)}
    accelerate.dispatch_model(
        pipe.transformer, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
    )
    with apply_plan(pipe, plan) as run:
        assert torch.equal(pipe(STEPS), expected)
    assert run.report().warnings == ()


def test_a_group_across_two_devices_ends_on_the_second() -> None:
    """The `meta` device stands in for a second accelerator: it has shapes and no values."""
    model, inputs = build("QwenImageTransformer2DModel")
    seen: dict[int, list[str]] = {i: [] for i in range(4)}
    for index, block in enumerate(model.transformer_blocks):
        if index >= 2:
            block.to("meta")
            add_hook_to_module(block, AlignDevicesHook(execution_device="meta"))
        block.register_forward_hook(
            lambda module, args, output, i=index: seen[i].append(output[1].device.type)
        )
    for child in (model.norm_out, model.proj_out):
        child.to("meta")
        add_hook_to_module(child, AlignDevicesHook(execution_device="meta"))
    pipe = LoopPipeline(model, inputs)
    plan = make_plan(pipe, 3, [group(LIST, 0, 3, "##1")], branches=1)
    devices = []
    with torch.no_grad(), apply_plan(pipe, plan) as run:
        pipe.scheduler.set_timesteps(3)
        latent = torch.zeros(1)
        for t in pipe.scheduler.timesteps:
            output = model(**inputs, return_dict=False)[0]
            devices.append(output.device.type)
            held = run.main.units.groups[0]._held.get((None, 0), {})
            stored = {
                tensor.device.type for streams in held.values() for tensor in streams.values()
            }
            assert stored == {"meta"}
            pipe.scheduler.step(latent, t, latent)
    assert devices == ["meta"] * 3
    assert seen == {0: ["cpu"] * 2, 1: ["cpu"] * 2, 2: ["meta"] * 2, 3: ["meta"] * 3}
    assert run.report().warnings == ()


@pytest.mark.parametrize(("first", "second"), [("cpu", "meta"), ("meta", "cpu")])
def test_arithmetic_follows_the_later_device(first: str, second: str) -> None:
    before, after = torch.zeros(3, device=first), torch.zeros(3, device=second)
    if first == "meta":
        # Values cannot come back from `meta`; only that a move is asked for shows.
        with pytest.raises(NotImplementedError, match="meta"):
            add(before, after)
        return
    moved: Tensor = add(before, after)
    assert moved.device.type == second
