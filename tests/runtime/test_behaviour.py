"""What the runtime does when it is put on, taken off, misused or interrupted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig

from layercache.errors import (
    LayerCacheError,
    ModelMismatchError,
    PlanError,
    UnsupportedModelError,
)
from layercache.runtime import _session as session_module
from layercache.runtime import apply_plan
from layercache.runtime.arithmetic import signature
from tests.models.zoo import build
from tests.runtime.harness import LoopPipeline, group, make_plan, step, traces
from tests.runtime.mixed import LIST, MIXED, STEPS, pipeline, tensors

# -- putting on and taking off ---------------------------------------------------------------------


def test_a_failed_installation_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline()
    pipe(1)
    before = traces(pipe.transformer)

    def broken(*_: Any) -> None:
        raise RuntimeError("no tap")

    monkeypatch.setattr(session_module, "tap_step", broken)
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


def test_another_cache_and_a_plan_exclude_each_other() -> None:
    pipe = pipeline()
    plan = make_plan(pipe, STEPS, MIXED)
    config = FirstBlockCacheConfig(threshold=0.1)
    with apply_plan(pipe, plan), pytest.raises(LayerCacheError, match="remove the plan first"):
        pipe.transformer.enable_cache(config)
    pipe.transformer.enable_cache(config)
    with pytest.raises(LayerCacheError, match=r"call transformer.disable_cache\(\) first"):
        apply_plan(pipe, plan)
    pipe.transformer.disable_cache()
    apply_plan(pipe, plan).remove()


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


@pytest.mark.parametrize("change", [{"sigmas": [1.0, 0.0]}, {"step": None}])
def test_a_scheduler_that_cannot_be_followed_is_refused(change: dict[str, Any]) -> None:
    pipe = pipeline()
    plan = make_plan(pipe, STEPS, MIXED)
    parts = {"sigmas": torch.tensor([1.0, 0.0]), "step": print} | change
    scheduler = SimpleNamespace(**{k: v for k, v in parts.items() if v is not None})
    with pytest.raises(UnsupportedModelError, match=r"no sigmas \(one tensor\) or no step"):
        apply_plan(SimpleNamespace(transformer=pipe.transformer, scheduler=scheduler), plan)


def test_a_plan_that_was_taken_off_cannot_be_entered_again() -> None:
    """A second `with` would look like a run under the plan and compute everything."""
    pipe = pipeline()
    with apply_plan(pipe, make_plan(pipe, STEPS, MIXED)) as run:
        pass
    with pytest.raises(LayerCacheError, match="call apply_plan again"), run:
        pass


def test_another_setting_gives_one_warning() -> None:
    pipe = pipeline()
    setting = {"scheduler": "UniPCMultistepScheduler", "dtype": "bfloat16"}
    plan = make_plan(pipe, STEPS, MIXED, setting=setting)
    with pytest.warns(UserWarning, match=r"scheduler is .*; dtype is") as caught:
        apply_plan(pipe, plan).remove()
    assert len(caught) == 1


# -- the schedule ----------------------------------------------------------------------------------


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
    assert run.report().warnings[0] == ("step: what step 3 repeats was not stored (2 times)")
    assert torch.equal(result, pipe(STEPS, start=3))


def test_a_multistep_run_that_starts_late_computes_until_its_rows_are_whole() -> None:
    pipe = pipeline()
    taps = [[], [], [0.4, -0.1], [], [0.3], []]
    plan = make_plan(pipe, STEPS, [step("###0#0", taps=taps)])
    with apply_plan(pipe, plan) as run:
        result = pipe(STEPS, start=2)
        report = run.report()
    # Step 2 cannot be corrected, so step 3, which would repeat it, is computed.
    assert any("taps of step 2" in warning for warning in report.warnings)
    (unit,) = report.units
    assert sum(unit.seen_computed.values()) == 2 * 3
    assert not torch.equal(result, pipe(STEPS, start=2))


def test_taps_read_what_was_computed_even_if_the_scheduler_writes_into_what_it_gets() -> None:
    pipe = pipeline()
    taps = [[], [0.5], [], [0.3, -0.2], [], []]
    plan = make_plan(pipe, STEPS, [step("##0#00", taps=taps)])
    with apply_plan(pipe, plan):
        expected = pipe(STEPS)
    original = pipe.scheduler.step

    def writing(velocity: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(velocity, *args, **kwargs)
        velocity.fill_(float("nan"))
        return result

    pipe.scheduler.step = writing
    try:
        with apply_plan(pipe, plan):
            assert torch.equal(pipe(STEPS), expected)
    finally:
        del pipe.scheduler.step


class Varying(LoopPipeline):
    """From step 3 on its inputs are changed."""

    change: Any = None

    def arguments(self, sigma: float, latent: Any, branch: str) -> dict[str, Any]:
        arguments = super().arguments(sigma, latent, branch)
        if (self.scheduler._step_index or 0) >= 3:
            arguments = self.change(arguments)
        return arguments


def _shorter_text(arguments: dict[str, Any]) -> dict[str, Any]:
    names = ("encoder_hidden_states", "encoder_hidden_states_mask")
    return arguments | {name: arguments[name][:, :3] for name in names}


def _double_precision(arguments: dict[str, Any]) -> dict[str, Any]:
    return arguments | {"timestep": arguments["timestep"].double()}


@pytest.mark.parametrize("change", [_shorter_text, _double_precision])
@pytest.mark.parametrize("unit", [step("##0000"), group(LIST, 0, 4, "##0000")])
def test_a_change_of_shape_or_dtype_within_a_run_drops_what_is_stored(
    change: Any, unit: Any
) -> None:
    pipe = Varying(*build("QwenImageTransformer2DModel"))
    pipe.change = change
    with apply_plan(pipe, make_plan(pipe, STEPS, [unit])) as run:
        with pytest.warns(UserWarning, match="differed from its plan"):
            assert pipe(STEPS).isfinite().all()
        seen = run.report().units[0]
        assert seen.seen_predicted["cond"] == 1
        assert any("changed shape, dtype or device" in w for w in run.report().warnings)


def test_every_tensor_of_a_call_counts() -> None:
    def described(tensor: torch.Tensor, **more: Any) -> Any:
        return signature((None, tensor), {"nested": {0: [tensor, None]}, "scale": 2.0} | more)

    plain = torch.zeros(2, 3)
    assert described(plain) == described(torch.ones(2, 3), mask=None)
    for other in (plain.double(), plain[:1], plain.to("meta")):
        assert described(other) != described(plain)
        assert signature((), {"nested": {0: [other]}}) != signature((), {"nested": {0: [plain]}})


def test_a_scheduler_that_finds_its_own_start_is_caught_up_with() -> None:
    """Some image-to-image pipelines do not tell the scheduler where they begin."""
    pipe = pipeline()
    plan = make_plan(pipe, STEPS, [group(LIST, 0, 4, "##00#0")])
    pipe.scheduler.set_begin_index = lambda index: None
    with apply_plan(pipe, plan) as run, pytest.warns(UserWarning, match="differed"):
        # The first call is taken for step 0 and is step 2 in truth.
        result = pipe(STEPS, start=2)
    assert "the run jumped from step 0 to step 3" in run.report().warnings
    # Nothing of the first call is used; step 5 is predicted from step 4.
    assert run.report().units[0].seen_predicted == {"cond": 1, "uncond": 1}
    assert result.isfinite().all()


# -- branches --------------------------------------------------------------------------------------


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


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "units",
    [
        MIXED,
        [step("##0000")],
        [step("##0#00", taps=[[], [0.5], [], [0.3, -0.2], [], []])],
        [step("####0#", taps=[[], [], [0.1], [0.2, 0.0, 0.1], [], [0.1, 0.1, 0.1]])],
        [group(LIST, 0, 4, "##1###")],
        [group(LIST, i, i + 1, "###212") for i in range(4)],
    ],
    ids=["mixed", "step", "multistep", "deep multistep", "one group", "a group a block"],
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
        assert run.held_bytes == 0
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
        assert run.held_bytes == 0
        assert torch.equal(pipe(STEPS), expected)


def test_nothing_is_kept_under_grad_mode() -> None:
    pipe = pipeline()
    inputs = pipe.arguments(0.5, None, "cond")
    with apply_plan(pipe, make_plan(pipe, STEPS, MIXED)) as run:
        with pytest.warns(UserWarning, match="gradients are enabled"):
            output = pipe.transformer(**inputs, return_dict=False)[0]
        output.sum().backward()
        assert run.held_bytes == 0
    assert next(pipe.transformer.parameters()).grad is not None


def test_inference_mode_works() -> None:
    pipe = pipeline()
    with apply_plan(pipe, make_plan(pipe, STEPS, MIXED)) as run:
        expected = pipe(STEPS)
        with torch.inference_mode():
            result = LoopPipeline.__call__.__wrapped__(pipe, STEPS)
            assert torch.allclose(result, expected, atol=1e-5)
        assert run.report().warnings == ()
