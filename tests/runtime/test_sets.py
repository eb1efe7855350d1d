"""Sets of plans on a pipeline, and plans that are switched off for a call."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from layercache import (
    ModelMismatchError,
    Plan,
    PlanError,
    PlanSet,
    UnsupportedModelError,
    compile_plan,
)
from layercache.calibration import calibrate
from layercache.runtime import apply_plan
from layercache.stats import CalibrationStats
from tests.tiny import tiny_arguments, tiny_pipeline

PROMPT = "a red circle"


def arguments(steps: int) -> dict[str, Any]:
    found = tiny_arguments()
    return found | {"num_inference_steps": steps}


def image(pipe: Any, steps: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        made: Tensor = pipe(
            PROMPT, **arguments(steps) | {"generator": generator, "output_type": "latent"}
        ).images
    return made


@pytest.fixture
def pipe() -> Any:
    return tiny_pipeline()


def stats_of(steps: int) -> CalibrationStats:
    call = {
        k: v for k, v in arguments(steps).items() if k not in ("generator", "num_inference_steps")
    }
    return calibrate(
        tiny_pipeline(), [PROMPT], num_inference_steps=steps, groups=2, lags=3, probes=0,
        call_kwargs=call, progress=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    six, four = stats_of(6), stats_of(4)
    return {
        "six": compile_plan(six, 0.7, units=("step",)),
        "six groups": compile_plan(six, 0.8, units=("groups",)),
        "four": compile_plan(four, 0.8, units=("groups",)),
    }


def alone(plan: Plan, steps: int) -> Tensor:
    fresh = tiny_pipeline()
    with apply_plan(fresh, plan):
        return image(fresh, steps)


def test_each_run_takes_the_plan_for_its_schedule(pipe: Any, plans: dict[str, Plan]) -> None:
    both = PlanSet(plans=(plans["six"], plans["four"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with apply_plan(pipe, both) as run:
            for steps, name, number in ((6, "six", 0), (4, "four", 1), (6, "six", 0)):
                assert torch.equal(image(pipe, steps), alone(plans[name], steps))
                report = run.report()
                assert run.plan == plans[name]
                assert report.plan.startswith(f"{number} of 2: {steps} steps")
                assert report.plan in str(report) and not report.warnings


def test_of_several_for_one_schedule_the_first_runs(pipe: Any, plans: dict[str, Plan]) -> None:
    for names in (("six", "six groups"), ("six groups", "six")):
        with apply_plan(pipe, PlanSet(plans=tuple(plans[name] for name in names))) as run:
            assert torch.equal(image(pipe, 6), alone(plans[names[0]], 6))
            assert run.plan == plans[names[0]]


def test_a_schedule_that_no_plan_is_for_is_refused(pipe: Any, plans: dict[str, Plan]) -> None:
    both = PlanSet(plans=(plans["six"], plans["four"]))
    with apply_plan(pipe, both), pytest.raises(ModelMismatchError, match="of 2 plans"):
        image(pipe, 5)
    plain = image(pipe, 5)
    with apply_plan(pipe, both, on_mismatch="compute"), pytest.warns(UserWarning, match="in full"):
        assert torch.equal(image(pipe, 5), plain)


def test_a_set_for_another_component_is_refused(pipe: Any, plans: dict[str, Plan]) -> None:
    with pytest.raises(PlanError, match="transformer_2"):
        apply_plan(pipe, PlanSet(plans=(plans["six"],)), component="transformer_2")
    with pytest.raises(PlanError):
        apply_plan(pipe, [plans["six"]])  # type: ignore[arg-type]


def test_off_computes_in_full_and_on_again_as_before(pipe: Any, plans: dict[str, Plan]) -> None:
    plain, cached = image(pipe, 6), alone(plans["six groups"], 6)
    assert not torch.equal(plain, cached)
    with apply_plan(pipe, plans["six groups"]) as run:
        assert torch.equal(image(pipe, 6), cached)
        with run.off():
            assert torch.equal(image(pipe, 6), plain)
            assert torch.equal(image(pipe, 4), image(pipe, 4)), "other schedules are no error"
        assert torch.equal(image(pipe, 6), cached)
    assert torch.equal(image(pipe, 6), plain)


def test_a_pipeline_with_a_plan_on_it_is_not_calibrated(pipe: Any, plans: dict[str, Plan]) -> None:
    call = {k: v for k, v in arguments(6).items() if k not in ("generator", "num_inference_steps")}
    with apply_plan(pipe, plans["six groups"]), pytest.raises(UnsupportedModelError):
        calibrate(pipe, [PROMPT], num_inference_steps=6, call_kwargs=call, progress=False)
