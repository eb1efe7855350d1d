"""A run recorded and enacted again: schedulers, kept outputs, options, experts in one run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from layercache.calibration import Options, calibrate
from layercache.calibration._kept import Kept
from layercache.calibration._options import OptionValues
from layercache.calibration._record import Run, StepCalls
from layercache.calibration._scheduler import check_scheduler
from layercache.errors import StatsError, UnsupportedModelError
from tests.calibration.test_calibrate import PROMPTS, measure
from tests.tiny import tiny_pipeline

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def scheduler(name: str, **options: Any) -> Any:
    made = getattr(diffusers, name)(**options)
    made.set_timesteps(8)
    return made


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
        ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1}),
        ("UniPCMultistepScheduler", FLOW),
        ("UniPCMultistepScheduler", {**FLOW, "solver_order": 3}),
        ("DPMSolverMultistepScheduler", FLOW),
        ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    ],
)
def test_deterministic_flow_schedulers_can_be_calibrated(
    name: str, options: dict[str, Any]
) -> None:
    made = scheduler(name, **options)
    state = torch.get_rng_state()
    check_scheduler(made)
    assert torch.equal(state, torch.get_rng_state()) and made.step_index is None


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("FlowMatchLCMScheduler", {}, "draws noise"),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "draws noise"),
        ("DPMSolverMultistepScheduler", {**FLOW, "algorithm_type": "sde-dpmsolver++"}, "noise"),
        ("EulerDiscreteScheduler", {}, "no flow-matching"),
        ("DDIMScheduler", {}, "no noise levels"),
        ("DPMSolverMultistepScheduler", {**FLOW, "final_sigmas_type": "sigma_min"}, "end at 0"),
        ("UniPCMultistepScheduler", {**FLOW, "prediction_type": "epsilon"}, "'epsilon'"),
    ],
)
def test_other_schedulers_are_refused_by_name(
    name: str, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(StatsError, match=reason) as raised:
        check_scheduler(scheduler(name, **options))
    assert name in str(raised.value)


def test_a_refused_scheduler_costs_no_call_of_the_transformer() -> None:
    pipe = tiny_pipeline()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    calls: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(StatsError, match="draws noise"):
        measure(pipe, PROMPTS[:1])
    assert not calls


@pytest.mark.parametrize("limit", [0, 40, 1e9])
def test_what_is_kept_comes_back_whatever_the_memory(limit: float) -> None:
    outputs: list[Any] = [(torch.randn(2, 3),), [torch.ones(4)], {"sample": torch.zeros(1)}]
    kept = Kept(limit)
    for step, output in enumerate(outputs):
        kept.put((step, 0, None), output)
    assert kept.held <= limit
    outputs[0][0].zero_()
    first = kept.get((0, 0, None))
    assert isinstance(first, tuple) and first[0].any(), "a copy was kept"
    first[0].zero_()
    assert kept.get((0, 0, None))[0].any(), "and a copy is handed out"
    assert torch.equal(kept.get((1, 0, None))[0], torch.ones(4))
    assert torch.equal(kept.get((2, 0, None))["sample"], torch.zeros(1))
    kept.close()


def test_options_are_written_once_and_their_names_agree() -> None:
    assert set(OptionValues.__annotations__) == set(Options.__dataclass_fields__)


def recorded(calls: list[StepCalls]) -> Run:
    run = Run(Kept(0), calls=calls)
    run.velocities = [torch.zeros(1)] * len(calls)
    return run


def test_loads_and_segments_follow_the_calls() -> None:
    one = {"shapes": [("a",)], "elements": [(10, 20, 5)]}
    two = {"shapes": [("a",), ("a",)], "elements": [(10, 20, 5), (10, 20, 5)]}
    # Guidance starts at step 1 and ends at step 3; the last step is another expert's.
    run = recorded([StepCalls("t", **one), StepCalls("t", **two), StepCalls("t", **two),
                    StepCalls("t", **one), StepCalls("other")])  # fmt: skip
    np.testing.assert_array_equal(run.segments("t"), [0, 1, 1, 2, 3])
    np.testing.assert_array_equal(run.loads("t")[:, 0], [0.5, 1, 1, 0.5, 0])


def test_elements_that_are_not_the_models_to_move_count_for_nothing() -> None:
    run = Run(Kept(0), sigmas=(1.0, 0.5, 0.0))
    run.velocities = [torch.tensor([[1.0, 7.0]])] * 2
    run.latents = [torch.tensor([[1.0, 3.0]]), torch.tensor([[0.5, 3.0]]), torch.zeros(1, 2)]
    run.left, run.missing = torch.tensor([[1, 0]]), torch.zeros(1, 2)
    assert torch.equal(run.velocity(0), torch.tensor([[1.0, 0.0]]))
    assert torch.equal(run.displacement(1), torch.tensor([[-0.5, 0.0]]))


def test_a_model_whose_output_points_the_other_way_is_signed() -> None:
    run = Run(Kept(0), sigmas=(1.0, 0.0))
    run.velocities, run.latents = [torch.tensor([[-2.0]])], [torch.ones(1, 1), -torch.ones(1, 1)]
    assert run.sign == -1 and run.velocity(0).item() == 2.0


def experts() -> WanPipeline:
    def expert(seed: int) -> WanTransformer3DModel:
        torch.manual_seed(seed)
        return WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
            text_dim=24, freq_dim=32, ffn_dim=48, num_layers=4, rope_max_seq_len=32,
        ).eval()  # fmt: skip

    pipe = WanPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=expert(0),
        transformer_2=expert(1), vae=None, text_encoder=None, tokenizer=None, boundary_ratio=0.7,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_two_experts_are_calibrated_in_one_run_as_they_are_apart() -> None:
    prompt = {name: torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(i))
              for i, name in enumerate(("prompt_embeds", "negative_prompt_embeds"))}  # fmt: skip

    def run(component: Any) -> Any:
        return calibrate(
            experts(), [prompt], component=component, num_inference_steps=8, lags=2, groups=2,
            progress=False, call_kwargs={"height": 32, "width": 32, "num_frames": 5},
        )  # fmt: skip

    both = run(("transformer", "transformer_2"))
    for name in both:
        alone = run(name)
        assert both[name].component == name
        for field in ("velocities", "latents", "deltas", "loads", "segments"):
            np.testing.assert_array_equal(getattr(both[name], field), getattr(alone, field))
    loads = both["transformer"].loads[:, 0] + both["transformer_2"].loads[:, 0]
    np.testing.assert_array_equal(loads, 1.0)
    made = both["transformer"].loads[:, 0] > 0
    assert made[0] and not made[-1]
    assert not both["transformer"].deltas[:, ~made].any()
    # Two groups at once were measured where a model had made the step before, and nowhere else.
    for name, own in (("transformer", made), ("transformer_2", ~made)):
        stats = both[name]
        steps = [int(np.flatnonzero(stats.sigmas == sigma)[0]) for sigma in stats.response_sigmas]
        assert steps and all(own[step] and own[step - 1] for step in steps)
        assert (stats.responses[..., 2] > 0).all()


@pytest.mark.parametrize("component", ["scheduler", "decoder", (), ("transformer", "transformer")])
def test_a_component_that_is_none_is_refused(component: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="component="):
        measure(tiny_pipeline(), component=component)


def compiled_whole(pipe: Any) -> None:
    pipe.transformer.compile(backend="eager")


def compiled_blocks(pipe: Any) -> None:
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend="eager", fullgraph=True)


@pytest.mark.parametrize(("prepare", "works"), [(compiled_whole, False), (compiled_blocks, True)])
def test_compiled_models(prepare: Callable[[Any], None], works: bool) -> None:
    torch._dynamo.reset()
    pipe = tiny_pipeline()
    prepare(pipe)
    options: dict[str, Any] = {"num_inference_steps": 3, "lags": 1, "probes": 0}
    if works:
        assert measure(pipe, PROMPTS[:1], **options).num_steps == 3
        return
    with pytest.raises(UnsupportedModelError, match="calibrate before compiling"):
        measure(pipe, PROMPTS[:1], **options)
