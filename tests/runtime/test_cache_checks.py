"""The six checks that diffusers makes of every cache it ships, re-expressed for plans.

Its `CacheTesterMixin` (tests/models/testing_utils/cache.py, not in its wheel) asks of a cache on a
model: state that is told, no second one, hooks that come and go, an inference that is cached,
contexts that keep apart, and a reset. Here a plan takes the place of `enable_cache`, and a new run
that of the reset. Each check is made with groups of blocks and with whole steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from layercache.errors import LayerCacheError
from layercache.models import adapter_for, model_fingerprint
from layercache.models.adapters import timeless_blocks
from layercache.models.gates import gate_of
from layercache.plan import Plan
from layercache.runtime import PlanRun, apply_plan
from tests.models.zoo import BUILDERS, build
from tests.runtime.harness import LoopPipeline, group, make_plan, step

STEPS = 3


def groups(pipe: LoopPipeline) -> Plan:
    lists = model_fingerprint(pipe.transformer)["block_lists"]
    return make_plan(pipe, STEPS, [group(n, 0, count, "#0#") for n, count in lists.items()])


def whole_steps(pipe: LoopPipeline) -> Plan:
    return make_plan(pipe, STEPS, [step("#0#")])


WITH_CONTEXTS = [name for name in BUILDERS if hasattr(build(name)[0], "cache_context")]
every_model = pytest.mark.parametrize("name", BUILDERS)
both = pytest.mark.parametrize("make", [groups, whole_steps])
Make = Callable[[LoopPipeline], Plan]


def gates(pipe: LoopPipeline) -> int:
    return sum(gate_of(module) is not None for module in pipe.transformer.modules())


def advance(pipe: LoopPipeline, output: Tensor, index: int) -> Tensor:
    """Let the scheduler make its step; what it received."""
    sample = torch.zeros_like(output)
    time = pipe.scheduler.timesteps[index]
    width = pipe.scheduler.sigmas[index + 1] - pipe.scheduler.sigmas[index]
    result: Tensor = pipe.scheduler.step(output, time, sample, return_dict=False)[0]
    return result / width


def begin(pipe: LoopPipeline) -> None:
    pipe.scheduler.set_timesteps(STEPS)


def test_more_than_fourteen_models_have_contexts() -> None:
    assert len(WITH_CONTEXTS) >= 14
    assert len(BUILDERS) >= 24


@every_model
@both
def test_state_double_plan_and_hooks(name: str, make: Make) -> None:
    """Checks 1 to 3: `active`, a second plan, gates that come and go."""
    pipe = LoopPipeline(*build(name))
    plan = make(pipe)
    assert gates(pipe) == 0
    run = apply_plan(pipe, plan)
    assert run.active
    blocks = sum(model_fingerprint(pipe.transformer)["block_lists"].values())
    always = 1 + len(timeless_blocks(pipe.transformer, adapter_for(pipe.transformer)))
    assert gates(pipe) == (always + blocks if make is groups else always)
    with pytest.raises(LayerCacheError, match="already: remove that one first"):
        apply_plan(pipe, plan)
    assert run.active
    run.remove()
    assert not run.active
    assert gates(pipe) == 0
    apply_plan(pipe, plan).remove()


@every_model
@both
@torch.no_grad()
def test_inference(name: str, make: Make) -> None:
    """Check 4: the second pass is cached, finite, and differs from the pass without a plan."""
    pipe = LoopPipeline(*build(name))
    plan = make(pipe)
    latent = torch.ones(1)
    begin(pipe)
    bare_first, bare_second = pipe.call(0.9, None, "cond"), pipe.call(0.4, latent, "cond")
    with apply_plan(pipe, plan) as run:
        begin(pipe)
        first = advance(pipe, pipe.call(0.9, None, "cond"), 0)
        second = advance(pipe, pipe.call(0.4, latent, "cond"), 1)
        third = pipe.call(0.4, latent, "cond")
    torch.testing.assert_close(first, bare_first, rtol=1e-5, atol=1e-6)
    assert second.isfinite().all()
    assert not torch.allclose(second, bare_second, atol=1e-5)
    assert torch.equal(third, bare_second)
    assert all(sum(unit.seen_predicted.values()) == 1 for unit in run.report().units)


@pytest.mark.parametrize("name", WITH_CONTEXTS)
@both
@torch.no_grad()
def test_contexts_keep_apart(name: str, make: Make) -> None:
    """Check 5: the first pass of every context is computed, and its state is its own."""
    pipe = LoopPipeline(*build(name))
    transformer: Any = pipe.transformer
    plan = make(pipe)

    def calls(latents: dict[str, float]) -> dict[str, Tensor]:
        found = {}
        for context, value in latents.items():
            with transformer.cache_context(context):
                arguments = pipe.arguments(0.8, torch.full((1,), value), "cond")
                output = transformer(**arguments, return_dict=False)
                output = output[0] if isinstance(output, tuple) else output
                found[context] = output[0] if isinstance(output, list) else output
        return found

    with apply_plan(pipe, plan) as run:
        begin(pipe)
        same = calls({"context_1": 1.0, "context_2": 1.0})
        torch.testing.assert_close(same["context_1"], same["context_2"], rtol=0, atol=1e-6)
        run.remove()
    with apply_plan(pipe, plan):
        begin(pipe)
        computed = calls({"context_1": 1.0, "context_2": 3.0})
        advance(pipe, torch.zeros(4), 0)
        predicted = calls({"context_1": 1.0, "context_2": 3.0})
    for context, output in computed.items():
        # The same inputs again, so that each context's own state gives its own output.
        torch.testing.assert_close(predicted[context], output, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(predicted["context_1"], predicted["context_2"], atol=1e-4)


@every_model
@both
@torch.no_grad()
def test_a_new_run_resets(name: str, make: Make) -> None:
    """Check 6: nothing of a run that was left is used in the next one, or kept."""
    pipe = LoopPipeline(*build(name))
    transformer: Any = pipe.transformer
    run: PlanRun = apply_plan(pipe, make(pipe))
    begin(pipe)
    advance(pipe, pipe.call(0.9, None, "cond"), 0)
    assert run.held_bytes > 0
    if hasattr(transformer, "_reset_stateful_cache"):
        # diffusers calls this at the end of a pipeline's run; plans have no use for it.
        transformer._reset_stateful_cache()
    begin(pipe)
    again = pipe.call(0.4, torch.ones(1), "cond")
    assert run.report().units[0].seen_computed == {"cond" if name in WITH_CONTEXTS else "call 0": 1}
    run.remove()
    assert run.held_bytes == 0
    assert torch.equal(again, pipe.call(0.4, torch.ones(1), "cond"))
