"""Noise levels of other step counts, shifts and sizes, against diffusers' own schedulers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from layercache import CalibrationStats, compile_plan
from layercache.calibration import calibrate
from layercache.errors import StatsError
from layercache.models.fingerprint import _SCHEDULER_KEYS
from layercache.models.pipelines import run_pipeline
from layercache.retarget import TOLERANCE, resized, sigmas_for
from layercache.runtime import apply_plan
from tests.pipelines.table import ENTRIES
from tests.prediction.strategies import random_stats

EULER = diffusers.FlowMatchEulerDiscreteScheduler
DYNAMIC = {"use_dynamic_shifting": True}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
QWEN = {**DYNAMIC, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
# A scheduler, and whether the pipeline hands it levels that end at 1/T.
CASES: dict[str, tuple[Any, bool]] = {
    "SD3": (EULER(shift=3.0), False),
    "Wan": (EULER(shift=5.0), True),
    "Flux": (EULER(shift=3.0, **DYNAMIC), True),
    "Flux schnell": (EULER(shift=1.0, base_shift=0.5, max_shift=1.15), True),
    "Qwen-Image": (EULER(**QWEN), True),
    "linear": (EULER(**DYNAMIC, time_shift_type="linear"), True),
    "SD3 dynamic": (EULER(**DYNAMIC), False),
    "UniPC": (diffusers.UniPCMultistepScheduler(**FLOW), False),
    "DPM++": (diffusers.DPMSolverMultistepScheduler(**FLOW), False),
}


def levels(name: str, steps: int, tokens: int = 4096, **changes: Any) -> np.ndarray:
    """What diffusers makes."""
    scheduler, given = CASES[name]
    scheduler = type(scheduler).from_config(scheduler.config, **changes)
    config, more = scheduler.config, {}
    if config.get("use_dynamic_shifting"):
        more["mu"] = calculate_shift(
            tokens,
            config.base_image_seq_len,
            config.max_image_seq_len,
            config.base_shift,
            config.max_shift,
        )
    if given:
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), **more)
    else:
        scheduler.set_timesteps(steps, **more)
    return np.array(scheduler.sigmas.tolist())


def calibrated(name: str, steps: int = 20, **setting: Any) -> CalibrationStats:
    config = CASES[name][0].config
    kept = {f"scheduler_{key}": config[key] for key in _SCHEDULER_KEYS if key in config}
    shape = [16, 128, 128] if name == "SD3 dynamic" else [4096, 64]
    sizes = {"width": 1024, "height": 1024, "latent_shape": shape}
    stats = random_stats(0, steps=steps)
    return replace(stats, sigmas=levels(name, steps), setting={**kept, **sizes, **setting})


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("steps", "other"), [(50, 28), (20, 33), (8, 4), (3, 2)])
def test_another_step_count_is_what_diffusers_makes(name: str, steps: int, other: int) -> None:
    stats = calibrated(name, steps)
    assert sigmas_for(stats) == pytest.approx(stats.sigmas, abs=TOLERANCE)
    assert sigmas_for(stats, steps=other) == pytest.approx(levels(name, other), abs=1e-5)


@pytest.mark.parametrize("name", ["SD3", "Wan", "Flux schnell", "UniPC", "DPM++"])
def test_another_shift_is_what_diffusers_makes(name: str) -> None:
    key = "flow_shift" if "flow_shift" in CASES[name][0].config else "shift"
    found = sigmas_for(calibrated(name), shift=6.0, steps=16)
    assert found == pytest.approx(levels(name, 16, **{key: 6.0}), abs=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_another_size_is_what_diffusers_makes(name: str) -> None:
    stats = calibrated(name)
    found = sigmas_for(stats, size=(768, 1536), steps=16)
    assert found == pytest.approx(levels(name, 16, tokens=48 * 96), abs=1e-5)
    dynamic = bool(CASES[name][0].config.get("use_dynamic_shifting"))
    assert (found == pytest.approx(sigmas_for(stats, steps=16), abs=1e-4)) != dynamic


def test_a_shift_set_by_hand_is_recognised() -> None:
    stats = replace(calibrated("Wan"), sigmas=levels("Wan", 20, shift=2.5))
    found = sigmas_for(stats, steps=12)
    assert found == pytest.approx(levels("Wan", 12, shift=2.5), abs=1e-5)


@pytest.mark.parametrize(
    ("stats", "arguments", "symptom"),
    [
        (replace(calibrated("Wan"), sigmas=np.linspace(1, 0, 21) ** 2), {}, "no form"),
        # As Flux2's, whose shift depends on the step count.
        (replace(calibrated("Flux"), sigmas=levels("Flux", 20, tokens=5000)), {}, "image tokens"),
        (calibrated("Flux", latent_shape=None), {"steps": 10}, "image tokens"),
        (calibrated("Flux", width=None), {"size": (512, 512)}, "which size was calibrated"),
        (calibrated("Flux"), {"size": (1000, 1000)}, "no whole number"),
        (calibrated("Flux"), {"size": (0, 64)}, "size is"),
        (calibrated("Flux"), {"size": (512, 512), "shift": 2.0}, "shift or size"),
        (calibrated("Flux"), {"steps": 0}, "steps is 0"),
        (calibrated("Wan"), {"shift": -1.0}, "shift is -1"),
    ],
)
def test_what_is_not_known_is_refused(
    stats: CalibrationStats, arguments: dict[str, Any], symptom: str
) -> None:
    with pytest.raises(StatsError, match=symptom):
        sigmas_for(stats, **arguments)


def test_a_resized_setting_says_the_new_size() -> None:
    stats = calibrated("Flux", call={"height": 1024, "guidance_scale": 3.5})
    setting = resized(stats, (768, 1536)).setting
    assert (setting["width"], setting["height"]) == (768, 1536)
    assert setting["latent_shape"] == [48 * 96, 64]
    assert setting["call"] == {"height": 1536, "width": 768, "guidance_scale": 3.5}
    assert setting["calibrated_pixels"] == [1024, 1024]
    again = resized(resized(stats, (768, 1536)), (1024, 1024)).setting
    assert again["latent_shape"] == [4096, 64] and again["calibrated_pixels"] == [768, 1536]
    square = resized(calibrated("SD3 dynamic"), (768, 1536)).setting
    assert square["latent_shape"] == [16, 192, 96]
    with pytest.raises(StatsError, match="no whole number"):
        resized(calibrated("SD3 dynamic"), (1000 + 1, 1536))


@pytest.mark.parametrize(
    "pipeline", ["FluxPipeline", "QwenImagePipeline", "StableDiffusion3Pipeline"]
)
def test_a_plan_for_other_steps_and_size_runs_on_the_pipeline(pipeline: str) -> None:
    entry = next(e for e in ENTRIES if e.pipeline == pipeline and e.variant == "text-to-image")
    pipe, call = entry.build(), entry.call()
    prompts = [entry.prompt(seed) for seed in range(2)]
    # Its size is the pipeline's own default to tell.
    stats = calibrate(
        pipe, prompts, num_inference_steps=8, groups=2, lags=3, sketch_size=64, call_kwargs=call
    )
    assert stats.setting["pixels"] == [call["width"], call["height"]]
    size = (call["width"] * 2, call["height"])
    here = resized(stats, size)
    plan = compile_plan(here, 0.6, sigmas=sigmas_for(stats, steps=6, size=size))
    assert plan.num_steps == 6
    call = {**call, **entry.prompt(5), "width": size[0], "num_inference_steps": 6}
    with apply_plan(pipe, plan) as run:
        run_pipeline(pipe, call)
    report = run.report()
    assert report.warnings == ()
    assert all(unit.as_planned for unit in report.units)
