"""Synthetic statistics, for hypothesis and for plain tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from layercache.stats import CalibrationStats, Group


def random_stats(
    seed: int = 0,
    *,
    prompts: int = 4,
    steps: int = 12,
    groups: int = 3,
    lags: int = 5,
    size: int = 24,
    noise: float = 0.05,
    **changes: Any,
) -> CalibrationStats:
    """Smooth random trajectories: velocities and residuals are sums of slow waves over sigma."""
    rng = np.random.default_rng(seed)
    x = np.linspace(1, 1 / steps, steps)
    sigmas = np.append(3 * x / (1 + 2 * x), 0.0)
    waves = np.stack([np.sin((k + 1) * 2.1 * sigmas[:-1] + k) / (k + 1) for k in range(4)])

    def curve(*shape: int) -> np.ndarray:
        smooth = np.einsum("...ks,kt->...ts", rng.standard_normal((*shape, 4, size)), waves)
        return smooth + noise * rng.standard_normal(smooth.shape) * np.diff(sigmas).max()

    velocities = curve(prompts)
    residuals = 0.3 * rng.uniform(0.5, 2.0, (1, groups, 1, 1)) * curve(prompts, groups)
    deltas = np.zeros((prompts, steps, groups, lags, size))
    for step in range(steps):
        for lag in range(1, min(lags, step) + 1):
            deltas[:, step, :, lag - 1] = residuals[:, :, step - lag] - residuals[:, :, step]
    times = np.concatenate(
        [rng.uniform(2, 3, (prompts, groups)), np.full((prompts, 1), 0.5), np.ones((prompts, 1))],
        axis=1,
    )
    # Beyond what there is to answer: deltas above are sums, in which no group answers to another.
    measured = np.unique([min(1, steps - 1), steps // 2, steps - 1])
    answers = np.random.default_rng(seed + 1000)
    change = answers.uniform(0.5, 1.0, (prompts, len(measured), groups * (groups - 1) // 2))
    along, across = (
        answers.uniform(-0.1, 0.5, change.shape),
        answers.uniform(0.05, 0.2, change.shape),
    )
    responses = np.stack([along * change, (along**2 + across) * change, change], axis=-1)
    fields: dict[str, Any] = dict(
        sigmas=sigmas,
        groups=tuple(
            Group(block_list="blocks", start=2 * g, stop=2 * g + 2) for g in range(groups)
        ),
        branches=2,
        velocities=velocities.astype(np.float32),
        deltas=deltas.astype(np.float32),
        responses=responses,
        response_sigmas=sigmas[measured],
        times_ms=times,
        image_gain=rng.uniform(0.2, 0.3, prompts),
        amplification=np.exp(rng.uniform(-0.3, 0.7, (prompts, steps))),
        group_bytes=tuple(100 + 10 * g for g in range(groups)),
        velocity_bytes=40,
        output_bytes=80,
        numel=size,
        sketch_seed=0,
        prompt_ids=tuple(f"p{i:02d}" for i in range(prompts)),
        model={
            "class_name": "M",
            "block_lists": {"blocks": 2 * groups},
            "architecture": "a" * 8,
        },
        setting={"num_inference_steps": steps, "scheduler_shift": 3.0, "dtype": "float32"},
    )
    return CalibrationStats(**fields | changes)
