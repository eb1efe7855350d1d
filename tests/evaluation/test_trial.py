"""Plans that are run for real before one is chosen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from layercache import BudgetError, Options, Plan, PlanError, compile_plan
from layercache.calibration import calibrate
from layercache.choices import candidates
from layercache.evaluation.metrics import fidelity
from layercache.evaluation.trial import CHANGED_SSIM, Trial, generations, trial
from layercache.stats import CalibrationStats
from tests.tiny import tiny_arguments, tiny_pipeline

PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def stats(pipe: Any) -> CalibrationStats:
    return calibrate(
        pipe, PROMPTS, num_inference_steps=6, groups=2, lags=3, probes=0,
        call_kwargs=arguments(), progress=False,
    )  # fmt: skip


def arguments() -> dict[str, Any]:
    found = tiny_arguments()
    return {k: v for k, v in found.items() if k not in ("generator", "num_inference_steps")}


@pytest.fixture(scope="module")
def found(pipe: Any, stats: CalibrationStats) -> Trial:
    plans = candidates(stats, 0.7)
    return trial(pipe, plans, PROMPTS, call_kwargs=arguments(), progress=False)


def test_candidates_are_of_different_kinds(stats: CalibrationStats) -> None:
    plans = candidates(stats, 0.7)
    assert {"steps", "groups"} <= set(plans)
    assert not plans["steps"].groups and plans["groups"].run_steps == (True,) * 6
    assert set(candidates(stats, 0.7, Options(units="groups"))) == {"groups"}
    with pytest.raises(BudgetError):
        candidates(stats, 0.01)


def test_a_kind_that_comes_out_as_another_is_not_run_twice(stats: CalibrationStats) -> None:
    # Groups that cost as much as the step is worth are never cached beside it.
    dear = replace(stats, deltas=1e3 * stats.deltas)
    assert "both" not in candidates(dear, 0.7)


def test_plans_carry_what_was_measured(found: Trial) -> None:
    for name, plan in found.plans.items():
        seen = plan.measured
        assert seen is not None
        images = found.comparison.images[name, 1.0]
        quality = fidelity(images, found.comparison.references)
        assert seen.psnr_db == pytest.approx(quality.psnr_mean)
        assert seen.psnr_worst_db <= seen.psnr_tenth_db <= seen.psnr_median_db
        assert seen.changed == sum(v < CHANGED_SSIM for v in quality.ssim or ()) / len(PROMPTS)
        assert seen.images == len(PROMPTS) and seen.calibration_prompts
        assert Plan.from_dict(plan.to_dict()) == plan
        assert f"{seen.speedup:.2f}x" in plan.summary()


def test_the_best_is_the_measured_best_of_those_that_are_equally_fast(found: Trial) -> None:
    seen = {name: plan.measured for name, plan in found.plans.items()}
    fastest = max(m.speedup for m in seen.values() if m)
    fair = {n: m for n, m in seen.items() if m and m.speedup >= 0.95 * fastest}
    assert found.plan.measured == max(fair.values(), key=lambda m: m.psnr_db)
    assert found.best in fair


def test_a_compiled_plan_says_that_nothing_was_measured(stats: CalibrationStats) -> None:
    plan = compile_plan(stats, 0.7)
    assert plan.measured is None and "measured: nothing" in plan.summary()


def test_a_trial_refuses_what_it_cannot_compare(pipe: Any, stats: CalibrationStats) -> None:
    plan = compile_plan(stats, 0.7)
    other = compile_plan(stats, 0.8, sigmas=[1.0, 0.8, 0.6, 0.3, 0.0])
    for plans, prompts in (({}, PROMPTS), ({"a": plan}, []), ({"a": plan, "b": other}, PROMPTS)):
        with pytest.raises(PlanError):
            trial(pipe, plans, prompts, progress=False)
    assert generations(3, 8) == 32
