"""Context parallelism: two gloo processes, each with half of the sequence, under one plan.

diffusers asks PyTorch for an accelerator when it sets parallelism up; here it is told that there is
one, and everything else, the splitting hooks and the collectives, is real. Ring attention needs an
attention kernel that the CPU does not have, so this is Ulysses attention.
"""

from __future__ import annotations

import socket
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import ContextParallelConfig
from diffusers.hooks.context_parallel import funcol, remove_context_parallel
from torch import distributed, multiprocessing

from layercache.models import model_fingerprint
from layercache.models.gates import gate_of
from layercache.runtime import apply_plan, compile_blocks
from tests.models.zoo import build
from tests.runtime.harness import LoopPipeline, group, make_plan, step

STEPS = 4
# In how many blocks a plan's gate sits within a splitting hook; Flux splits at its root.
MODELS = {
    "WanTransformer3DModel": 1,
    "QwenImageTransformer2DModel": 1,
    "FluxTransformer2DModel": 0,
}


@pytest.mark.slow
def test_a_plan_on_two_processes_gives_what_it_gives_on_one() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    multiprocessing.spawn(_compare, (port,), nprocs=2)


def _compare(rank: int, port: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    try:
        for name in MODELS:
            _compare_one(name)
            _count_collectives(name)
    finally:
        distributed.destroy_process_group()


def _pipe(name: str) -> LoopPipeline:
    model, inputs = build(name)
    for key in ("encoder_hidden_states", "encoder_attention_mask", "encoder_hidden_states_mask"):
        if key in inputs:
            # Five tokens do not split in two.
            inputs[key] = torch.cat([inputs[key], inputs[key][:, :1]], dim=1)
    if "txt_ids" in inputs:
        inputs["txt_ids"] = torch.cat([inputs["txt_ids"], inputs["txt_ids"][:1]])
    return LoopPipeline(model, inputs)


def _parallel(pipe: LoopPipeline) -> None:
    pipe.transformer.set_attention_backend("native")
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))


def _compare_one(name: str) -> None:
    lists = model_fingerprint(_pipe(name).transformer)["block_lists"]
    # Groups over all blocks, so that the splitting block is in one.
    units = [step("###0"), *(group(n, 0, count, "##1.") for n, count in lists.items())]
    alone = _pipe(name)
    uncached = alone(STEPS)
    plan = make_plan(alone, STEPS, units)
    with apply_plan(alone, plan):
        expected = alone(STEPS)
    before, after = _pipe(name), _pipe(name)
    _parallel(before)
    assert _close(before(STEPS), uncached)
    with apply_plan(before, plan) as run:
        assert _close(before(STEPS), expected)
        assert run.report().warnings == ()
    assert _close(before(STEPS), uncached)
    # Parallelism that comes, and goes, under the plan.
    run = apply_plan(after, plan)
    assert _close(after(STEPS), expected)
    _parallel(after)
    assert _close(after(STEPS), expected)
    assert run.report().warnings == ()
    run.remove()
    assert _close(after(STEPS), uncached)
    assert all(gate_of(module) is None for module in after.transformer.modules())
    with apply_plan(before, plan) as run:
        remove_context_parallel(before.transformer, before.transformer._cp_plan)
        for module in before.transformer.modules():
            if hasattr(getattr(module, "processor", None), "_parallel_config"):
                module.processor._parallel_config = None
        assert _close(before(STEPS), expected)
        assert run.report().warnings == ()
    assert _close(before(STEPS), uncached)


def _count_collectives(name: str) -> None:
    """A plan makes the model's own collectives where it computes, and none of its own."""
    counts: Counter[str] = Counter()
    originals = {c: getattr(funcol, c) for c in ("all_to_all_single", "all_gather_tensor")}
    for collective, function in originals.items():
        setattr(funcol, collective, _counted(function, counts, collective))
    pipe = _pipe(name)
    _parallel(pipe)
    lists = model_fingerprint(pipe.transformer)["block_lists"]
    everything = [group(n, 0, count, "##00") for n, count in lists.items()]
    pipe(STEPS)
    alone = Counter(counts)
    assert alone["all_to_all_single"] > 0 and alone["all_gather_tensor"] > 0
    counts.clear()
    with apply_plan(pipe, make_plan(pipe, STEPS, everything)):
        pipe(STEPS)
    assert counts["all_to_all_single"] == alone["all_to_all_single"] * 2 // STEPS
    assert counts["all_gather_tensor"] == alone["all_gather_tensor"]
    counts.clear()
    with apply_plan(pipe, make_plan(pipe, STEPS, [step("##00")])):
        pipe(STEPS)
    assert counts == {name: count * 2 // STEPS for name, count in alone.items()}
    for collective, function in originals.items():
        setattr(funcol, collective, function)
    with apply_plan(pipe, make_plan(pipe, STEPS, everything)):
        compiled = compile_blocks(pipe.transformer, backend="eager")
    # A splitting block stays eager, since its gate is within.
    assert sum(lists.values()) - compiled == MODELS[name]


def _counted(function: Any, counts: Counter[str], name: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return function(*args, **kwargs)

    return call


def _close(result: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((result - expected).abs().max() < 1e-4 * expected.abs().max())
