"""Quality on the trained reference model, at reduced length: 4 prompts, 20 steps.

Calibration prompts make the plan; validation prompts judge it. Held-out prompts are for the demo.
"""

from __future__ import annotations

from typing import Any

import pytest

from layercache import CalibrationStats, compile_plan
from layercache.calibration import calibrate
from layercache.calibration.prompts import batches
from layercache.evaluation._latency import run_once
from layercache.evaluation.methods import Method
from layercache.evaluation.metrics import fidelity
from layercache.evaluation.peers import FewerSteps
from layercache.models.pipelines import run_pipeline
from layercache.plan import Plan
from layercache.reference import call_arguments, load_pipeline, prompts
from layercache.refine import refine_plan
from layercache.runtime import apply_plan

STEPS = 20


def arguments() -> dict[str, Any]:
    found = call_arguments(num_inference_steps=STEPS)
    del found["generator"]
    return found


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline()


@pytest.fixture(scope="module")
def stats(pipe: Any) -> CalibrationStats:
    return calibrate(
        pipe,
        prompts("calibration", 4),
        num_inference_steps=STEPS,
        lags=3,
        batch_size=4,
        call_kwargs=arguments(),
        progress=False,
    )


@pytest.fixture(scope="module")
def plan(stats: CalibrationStats) -> Plan:
    return compile_plan(stats, 0.6)


def psnr(pipe: Any, plan: Plan | None, method: Method | None = None) -> float:
    batch = batches(prompts("validation", 4), 1, 4, arguments())[0]
    reference = run_pipeline(pipe, batch.arguments)
    if method is not None:
        return fidelity(run_once(pipe, method, batch).images, reference).psnr_mean
    assert plan is not None
    with apply_plan(pipe, plan) as run:
        images = run_pipeline(pipe, batch.arguments)
    assert not run.report().warnings
    return fidelity(images, reference).psnr_mean


def test_the_plan_beats_fewer_steps_at_equal_compute(pipe: Any, plan: Plan) -> None:
    fewer = psnr(pipe, None, FewerSteps(12, STEPS, predicted_speedup=None))
    assert plan.predicted.compute_share <= 0.6 + 1e-9
    assert psnr(pipe, plan) > fewer + 3


def test_fitted_taps_beat_plain_reuse(pipe: Any, stats: CalibrationStats, plan: Plan) -> None:
    assert psnr(pipe, plan) > psnr(pipe, compile_plan(stats, 0.6, predictor="reuse")) + 3


def test_refining_helps_at_few_steps(pipe: Any, stats: CalibrationStats) -> None:
    plan = compile_plan(stats, 0.3, units=("step",))
    chosen = prompts("calibration", 4)
    refined = refine_plan(pipe, plan, stats, chosen, call_kwargs=arguments())
    note = refined.provenance["refined"]
    assert note["psnr_db_after"] > note["psnr_db_before"]
    assert psnr(pipe, refined) > psnr(pipe, plan)


def test_predicted_quality_is_of_the_right_size(pipe: Any, plan: Plan) -> None:
    assert plan.predicted.psnr_db is not None
    assert abs(plan.predicted.psnr_db - psnr(pipe, plan)) < 10


def test_early_errors_grow(stats: CalibrationStats) -> None:
    growth = stats.propagation
    assert growth[1] > 2 * growth[-2]
