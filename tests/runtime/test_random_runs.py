"""Random plans, models and call patterns: never a crash, a leak or a NaN.

Oracle for the values: a plan has no memory, so a run equals the same run on a fresh pipeline, and a
run from the first step to the last equals `harness.SlowRuntime`.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layercache.models import model_fingerprint
from layercache.plan import Plan, UnitPlan
from layercache.runtime import PlanRun, apply_plan
from tests.models.zoo import BUILDERS, build
from tests.runtime.harness import LoopPipeline, SlowRuntime, make_plan, random_units, traces
from tests.runtime.mixed import tensors

STEPS = 5
# Models of any depth; of the others, the depth that they have in the zoo.
DEPTHS = {
    "QwenImageTransformer2DModel": "num_layers",
    "FluxTransformer2DModel": "num_single_layers",
    "SD3Transformer2DModel": "num_layers",
    "WanTransformer3DModel": "num_layers",
    "ZImageTransformer2DModel": "n_layers",
    "LTXVideoTransformer3DModel": "num_layers",
}
runs = st.lists(
    st.fixed_dictionaries(
        {
            "guided": st.booleans(),
            "named": st.booleans(),
            "start": st.integers(0, STEPS - 1),
            "fail_at": st.none() | st.integers(1, 6),
            "leave_at": st.none() | st.integers(1, STEPS - 1),
            "inference_mode": st.booleans(),
            "halved": st.booleans(),
        }
    ),
    min_size=1,
    max_size=3,
)


class Stop(Exception):
    """Raised in the middle of a run."""


def pipeline(name: str, layers: int) -> LoopPipeline:
    return LoopPipeline(*build(name, **({DEPTHS[name]: layers} if name in DEPTHS else {})))


def perform(pipe: LoopPipeline, run: dict[str, Any]) -> torch.Tensor | None:
    """One run of the pipeline; None if it was stopped."""
    pipe.guided, pipe.named = run["guided"], run["named"]
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == run["fail_at"]:
            raise Stop

    whole = pipe.inputs
    if run["halved"] and type(pipe.transformer).__name__ in DEPTHS:
        # One image instead of two.
        pipe.inputs = {key: _first_of(key, value) for key, value in whole.items()}
    handle = pipe.transformer.register_forward_pre_hook(fail)
    mode = torch.inference_mode() if run["inference_mode"] else contextlib.nullcontext()
    try:
        with mode:
            return pipe(STEPS, start=run["start"], leave_at=run["leave_at"])
    except Stop:
        return None
    finally:
        handle.remove()
        pipe.inputs = whole


def _first_of(key: str, value: Any) -> Any:
    if isinstance(value, list) or (isinstance(value, torch.Tensor) and not key.endswith("_ids")):
        return value[:1]
    return value


def check(
    name: str,
    layers: int,
    plan: Plan,
    units: list[UnitPlan],
    run: PlanRun,
    pipe: LoopPipeline,
    call: dict[str, Any],
) -> None:
    result = perform(pipe, call)
    assert run.held_bytes == 0
    fresh = pipeline(name, layers)
    with apply_plan(fresh, plan):
        expected = perform(fresh, call)
    if result is None:
        assert expected is None
        return
    assert expected is not None
    assert result.isfinite().all()
    assert torch.equal(result, expected)
    whole = call["start"] == 0 and call["leave_at"] is None and not call["halved"]
    if whole and call["fail_at"] is None:
        fresh.guided = call["guided"]
        slow = SlowRuntime(fresh, STEPS, units).run()
        assert (result - slow).abs().max() <= 2e-5 * slow.abs().max()


@settings(max_examples=15)
@given(st.sampled_from(sorted(BUILDERS)), st.integers(1, 4), st.integers(0, 10**6), runs)
def test_runs_are_independent_and_leave_nothing(
    name: str, layers: int, seed: int, pattern: list[dict[str, Any]]
) -> None:
    pipe = pipeline(name, layers)
    pipe(1)
    lists = model_fingerprint(pipe.transformer)["block_lists"]
    units = random_units(lists, STEPS, random.Random(seed), with_step=seed % 2 == 0)
    plan = make_plan(pipe, STEPS, units)
    before = traces(pipe.transformer)
    with warnings.catch_warnings():
        # Runs that start late or end early differ from their plan, and say so.
        warnings.simplefilter("ignore")
        with apply_plan(pipe, plan) as run:
            for call in pattern:
                check(name, layers, plan, units, run, pipe, call)
        assert traces(pipe.transformer) == before
        # A second time, with everything that models keep by themselves in place.
        del run
        count = tensors()
        with apply_plan(pipe, plan) as run:
            for call in pattern:
                perform(pipe, call)
        del run
    assert tensors() == count
    assert traces(pipe.transformer) == before
