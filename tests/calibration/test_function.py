"""`calibrate_function` and `sample`. Oracles: sums by hand, known growth, one another."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from layercache import CalibrationStats, compile_plan
from layercache.calibration import calibrate_function
from layercache.calibration._propagation import probe_steps
from layercache.errors import PlanError, StatsError
from layercache.runtime import sample
from tests.prediction.strategies import random_stats

STEPS = 12
SIGMAS = tuple(float(s) for s in 3 * np.linspace(1, 0, STEPS + 1) / (1 + 2 * np.linspace(1, 0, 13)))
NOISES = np.random.default_rng(0).normal(size=(3, 2, 5))
CONDITIONS = [0.5, -1.0, 2.0]


def wave(z: Any, sigma: float, condition: float) -> Any:
    return (z + condition) * 0.8 + 2 * (sigma - 0.3) ** 2 * condition


def full(velocity: Any, noise: Any, condition: Any) -> Any:
    for here, there in itertools.pairwise(SIGMAS):
        noise = noise + (there - here) * velocity(noise, here, condition)
    return noise


def without_times(stats: CalibrationStats) -> CalibrationStats:
    return replace(stats, times_ms=np.ones_like(stats.times_ms))


def equal(one: CalibrationStats, other: CalibrationStats) -> bool:
    one, other = without_times(one), without_times(other)
    return one.prompt_ids == other.prompt_ids and all(
        np.allclose(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-6)
        for name in ("velocities", "latents", "amplification", "image_gain")
    )


def test_what_is_measured_is_the_loop() -> None:
    stats = calibrate_function(wave, SIGMAS, NOISES, CONDITIONS, name="wave")
    assert stats.num_groups == 0
    assert stats.deltas.shape == (3, STEPS, 0, 1, 10)
    assert stats.model == {"class_name": "wave", "block_lists": {}, "architecture": ""}
    assert stats.setting["latent_shape"] == [2, 5]
    # Sorted by identity, so each is looked for by its start.
    starts = stats.latents[:, 0].reshape(3, 2, 5)
    for noise, condition in zip(NOISES, CONDITIONS, strict=True):
        (row,) = np.flatnonzero(np.abs(starts - noise).max(axis=(1, 2)) < 1e-6)
        end = full(wave, noise, condition)
        np.testing.assert_allclose(stats.latents[row, -1].reshape(2, 5), end, rtol=1e-6)
        first = wave(noise, SIGMAS[0], condition).ravel()
        np.testing.assert_allclose(stats.velocities[row, 0], first, rtol=1e-6)
        assert stats.image_gain[row] == pytest.approx(1 / (end.max() - end.min()) ** 2)


def test_growth_is_that_of_the_differential_equation() -> None:
    """Of v = 0.8 z + ...: every later step multiplies an error by 1 + 0.8 dsigma."""
    stats = calibrate_function(wave, SIGMAS, NOISES, CONDITIONS)
    factors = 1 + 0.8 * np.diff(SIGMAS)
    for probe in probe_steps(SIGMAS):
        expected = factors[probe + 1 :].prod()
        np.testing.assert_allclose(stats.amplification[:, probe], expected, rtol=1e-4)
    plain = calibrate_function(wave, SIGMAS, NOISES, CONDITIONS, probes=0)
    assert (plain.amplification == 1).all() and plain.probes == 0


def test_tensors_and_arrays_are_measured_alike_and_alone_or_together(tmp_path: Path) -> None:
    stats = calibrate_function(wave, SIGMAS, NOISES, CONDITIONS)
    tensors = calibrate_function(wave, SIGMAS, torch.as_tensor(NOISES), CONDITIONS)
    assert equal(stats, tensors)
    parts = [
        calibrate_function(wave, SIGMAS, NOISES[part], CONDITIONS[part])
        for part in (slice(1), slice(1, None))
    ]
    assert equal(parts[1].merge(parts[0]), stats)
    stats.save(tmp_path / "stats.npz")
    assert equal(CalibrationStats.load(tmp_path / "stats.npz"), stats)


def test_a_buffer_that_is_written_over_changes_nothing() -> None:
    buffer = np.zeros((2, 5))

    def reusing(z: Any, sigma: float, condition: float) -> Any:
        buffer[:] = wave(z, sigma, condition)
        return buffer

    stats = calibrate_function(reusing, SIGMAS, NOISES, CONDITIONS)
    assert equal(stats, calibrate_function(wave, SIGMAS, NOISES, CONDITIONS))
    plan = compile_plan(stats, 0.5)
    found = sample(reusing, NOISES[0], plan, CONDITIONS[0])
    np.testing.assert_array_equal(found, sample(wave, NOISES[0], plan, CONDITIONS[0]))


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_a_linear_series_is_extrapolated_exactly(kind: Any) -> None:
    """Of v = a + b sigma: a plan of a third of the steps ends where all steps do."""
    offset, slope = kind(NOISES[1]), kind(NOISES[2])
    calls: list[float] = []

    def line(z: Any, sigma: float, condition: float) -> Any:
        calls.append(sigma)
        return condition * offset + sigma * slope

    stats = calibrate_function(line, SIGMAS, [kind(NOISES[0])], [1.0])
    plan = compile_plan(stats, 0.35, predictor="published")
    assert plan.run_steps[:2] == (True, True)
    calls.clear()
    found = sample(line, kind(NOISES[0]), plan, 1.0)
    assert len(calls) == sum(plan.run_steps) < STEPS / 2
    expected = full(line, kind(NOISES[0]), 1.0)
    assert type(found) is type(expected)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    # Another condition is extrapolated as exactly: the taps are those of a line.
    other = sample(line, kind(NOISES[0]), plan, 3.0)
    np.testing.assert_allclose(other, full(line, kind(NOISES[0]), 3.0), rtol=1e-9)


@pytest.mark.parametrize("budget", [0.5, 0.25])
def test_a_plan_is_worth_more_than_fewer_steps(budget: float) -> None:
    stats = calibrate_function(wave, SIGMAS, NOISES, CONDITIONS)
    plan = compile_plan(stats, budget)
    count = sum(plan.run_steps)
    x = np.linspace(1, 0, count + 1)
    few = [float(s) for s in 3 * x / (1 + 2 * x)]
    for noise, condition in zip(-NOISES, [0.3, -2.0, 1.0], strict=True):
        expected = full(wave, noise, condition)
        other = noise
        for here, there in itertools.pairwise(few):
            other = other + (there - here) * wave(other, here, condition)
        mine = np.abs(sample(wave, noise, plan, condition) - expected).max()
        assert mine < 0.3 * np.abs(other - expected).max()


def test_a_plan_that_caches_groups_is_refused() -> None:
    plan = compile_plan(random_stats(0), 0.8, units=("groups",))
    with pytest.raises(PlanError, match=r"caches groups.*blocks\["):
        sample(wave, NOISES[0], plan, 1.0)


def drawing(z: Any, sigma: float, condition: Any) -> Any:
    return wave(z, sigma, 1.0) + torch.randn(2, 5).numpy()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigmas": [0.0, 0.5, 1.0]}, "fall strictly"),
        ({"sigmas": [1.0, 0.5, 0.1]}, "fall strictly"),
        ({"sigmas": [0.0]}, "T\\+1 >= 2"),
        ({"noises": []}, "0 noises"),
        ({"conditions": [1.0]}, "3 noises and 1 conditions"),
        ({"noises": [NOISES[0], NOISES[1], NOISES[2, 0]]}, r"\(2, 5\), \(5,\)"),
        ({"noises": NOISES[[0, 1, 0]], "conditions": [1, 2, 1]}, "noise 2 "),
        ({"velocity": lambda z, sigma, condition: z[0]}, r"\(5,\).*\(2, 5\)"),
        ({"velocity": drawing}, "second time"),
        ({"velocity": lambda z, sigma, condition: z * np.nan}, "second time"),
        ({"probes": -1}, "probes=-1"),
        ({"sketch_size": 0}, "sketch_size=0"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(arguments: dict[str, Any], message: str) -> None:
    given = {"velocity": wave, "sigmas": SIGMAS, "noises": NOISES, "conditions": CONDITIONS}
    with pytest.raises(StatsError, match=message):
        calibrate_function(**given | arguments)


def test_functions_without_a_condition_get_none() -> None:
    seen = set()

    def velocity(z: Any, sigma: float, condition: Any) -> Any:
        seen.add(condition)
        return z

    calibrate_function(velocity, SIGMAS, NOISES)
    assert seen == {None}
