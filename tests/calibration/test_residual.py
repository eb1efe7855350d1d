"""Residual mode: what it costs, what it stores, and that plans can be made of it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from layercache import compile_plan
from layercache.calibration._jobs import Jobs
from layercache.calibration._residual import residual_deltas
from layercache.calibration.prompts import prompt_id
from layercache.errors import ModelMismatchError, StatsError
from tests.calibration.test_calibrate import LAGS, PROMPTS, STEPS, ByHand, measure
from tests.tiny import tiny_pipeline


def forwards(pipe: Any, **changes: Any) -> int:
    """How often the transformer's embedding ran during a calibration."""
    count = 0

    def note(*_: Any) -> None:
        nonlocal count
        count += 1

    handle = pipe.transformer.img_in.register_forward_pre_hook(note)
    measure(pipe, PROMPTS[:1], **changes)
    handle.remove()
    return count


def test_residual_mode_replays_only_to_scale() -> None:
    steps = 40
    replay, residual = (
        forwards(tiny_pipeline(), mode=mode, num_inference_steps=steps, probes=0)
        for mode in ("replay", "residual")
    )
    groups, branches, scale_steps, estimate = 2, 2, 5, 10
    assert residual <= branches * (steps + groups * scale_steps) + estimate
    # Lags of a group run as one batch.
    assert replay >= branches * (steps + groups * (steps - 1))


def test_a_stand_in_is_as_long_as_the_delta_where_it_was_replayed() -> None:
    replay = measure(tiny_pipeline())
    residual = measure(tiny_pipeline(), mode="residual")
    assert residual.mode == "residual" and residual.probes == 0
    np.testing.assert_array_equal(residual.velocities, replay.velocities)
    found, exact = (np.linalg.norm(s.deltas, axis=-1) for s in (residual, replay))
    # Five steps: each of the last four is a scale step.
    np.testing.assert_allclose(found[:, 1:, :, 0], exact[:, 1:, :, 0], rtol=1e-3)


def test_inner_products_are_those_of_the_residuals_of_all_streams_and_branches() -> None:
    stats = measure(tiny_pipeline(), mode="residual")
    row = stats.prompt_ids.index(prompt_id(PROMPTS[0], 0))
    hand = ByHand(tiny_pipeline(), PROMPTS[0])
    hand.run()
    z, history = hand.latents, []
    with torch.no_grad():
        for t in range(STEPS):
            velocity, residuals = hand.guided(z, hand.sigmas[t])
            parts = [s.flatten() for branch in residuals for s in branch[0]]
            history.append(torch.cat(parts).double())
            z = z + (hand.sigmas[t + 1] - hand.sigmas[t]) * velocity
    moved = torch.stack([history[4 - lag] - history[4] for lag in range(1, LAGS + 1)]).numpy()
    exact = moved @ moved.T
    sketched = stats.deltas[row, 4, 0].astype(np.float64)
    found = sketched @ sketched.T
    scale = found[0, 0] / exact[0, 0]
    norms = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    # A sketch of 3072 numbers is off by about 2.5 % of the norms' product.
    assert np.abs(found / scale - exact).max() < 0.15 * norms.max()


def test_the_scale_is_interpolated_over_sigma_in_the_logarithm() -> None:
    rng = np.random.default_rng(0)
    residuals = [rng.standard_normal((1, 1, 16)).astype(np.float32) for _ in range(5)]
    sigmas = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
    lengths = [np.linalg.norm(a - b) for a, b in itertools.pairwise(residuals)]
    norms = np.array([[[1.0 * lengths[0]], [4.0 * lengths[2]]]], np.float32)
    deltas = residual_deltas(residuals, norms, (1, 3), sigmas, lags=2)
    found = np.linalg.norm(deltas[0, 1:, 0, 0], axis=-1) / lengths
    np.testing.assert_allclose(found, [1.0, 2.0, 4.0, 4.0], rtol=1e-5)
    np.testing.assert_allclose(
        deltas[0, 3, 0, 1], 4.0 * (residuals[1] - residuals[3])[0, 0], rtol=1e-4, atol=1e-6
    )


def test_plans_say_which_mode_they_are_from() -> None:
    for mode in ("replay", "residual"):
        stats = measure(tiny_pipeline(), mode=mode)
        plan = compile_plan(stats, 0.7, units=("groups",))
        assert plan.provenance["calibration_mode"] == mode
        assert plan.provenance["sketch_seed"] == 0
        assert plan.provenance["prompts_sha256"] == stats.prompts_sha256


def test_modes_do_not_mix() -> None:
    replay = measure(tiny_pipeline(), PROMPTS[:1])
    residual = measure(tiny_pipeline(), PROMPTS[1:], mode="residual")
    with pytest.raises(ModelMismatchError, match=r"mode differs \('replay' and 'residual'\)"):
        replay.merge(residual)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(StatsError, match="mode is 'fast'; use 'replay' or 'residual'"):
        Jobs("fast", 4, 1, 1)


@pytest.mark.parametrize("steps", range(1, 9))
def test_scale_steps_have_a_history(steps: int) -> None:
    jobs = Jobs("residual", steps, 2, 3)
    assert all(1 <= step < steps for step in jobs.scale_steps)
    assert list(jobs.scale_steps) == sorted(set(jobs.scale_steps))
    assert len(jobs.scale_steps) == min(5, steps - 1)
