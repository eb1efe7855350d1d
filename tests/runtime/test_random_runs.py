"""Random plans, models and call patterns: never a crash, a leak or a NaN.

Oracle for the values: a plan has no memory, so a run equals the same run on a fresh pipeline.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layercache.models import model_fingerprint
from layercache.runtime import apply_plan
from tests.models.zoo import build
from tests.runtime.harness import LoopPipeline, SlowRuntime, make_plan, random_units, traces

STEPS = 5
MODELS = {
    "QwenImageTransformer2DModel": "num_layers",
    "FluxTransformer2DModel": "num_single_layers",
    "SD3Transformer2DModel": "num_layers",
    "WanTransformer3DModel": "num_layers",
}
runs = st.lists(
    st.fixed_dictionaries(
        {
            "guided": st.booleans(),
            "named": st.booleans(),
            "start": st.integers(0, STEPS - 1),
            "fail_at": st.none() | st.integers(1, 6),
        }
    ),
    min_size=1,
    max_size=3,
)


class Stop(Exception):
    """Raised in the middle of a run."""


def perform(pipe: LoopPipeline, run: dict[str, Any]) -> torch.Tensor | None:
    pipe.guided, pipe.named = run["guided"], run["named"]
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == run["fail_at"]:
            raise Stop

    handle = pipe.transformer.register_forward_pre_hook(fail)
    try:
        return pipe(STEPS, start=run["start"])
    except Stop:
        return None
    finally:
        handle.remove()


@settings(max_examples=15)
@given(st.sampled_from(sorted(MODELS)), st.integers(1, 4), st.integers(0, 10**6), runs)
def test_runs_are_independent_and_leave_nothing(
    name: str, layers: int, seed: int, pattern: list[dict[str, Any]]
) -> None:
    changes = {MODELS[name]: layers}
    pipe = LoopPipeline(*build(name, **changes))
    pipe(1)
    before = traces(pipe.transformer)
    lists = model_fingerprint(pipe.transformer)["block_lists"]
    units = random_units(lists, STEPS, random.Random(seed), with_step=seed % 2 == 0)
    plan = make_plan(pipe, STEPS, units)
    with apply_plan(pipe, plan) as run:
        for call in pattern:
            result = perform(pipe, call)
            assert run._held_bytes() == 0
            fresh = LoopPipeline(*build(name, **changes))
            with apply_plan(fresh, plan):
                expected = perform(fresh, call)
            if result is None:
                assert expected is None
                continue
            assert result.isfinite().all()
            assert expected is not None
            assert torch.equal(result, expected)
            if call["start"] == 0 and call["fail_at"] is None:
                fresh.guided = call["guided"]
                slow = SlowRuntime(fresh, STEPS, units).run()
                assert (result - slow).abs().max() <= 1e-5 * slow.abs().max()
    assert traces(pipe.transformer) == before
