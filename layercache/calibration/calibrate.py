"""`calibrate`: the entry point of calibration."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from layercache.calibration.collect import Measured, collect
from layercache.calibration.grouping import split_groups
from layercache.calibration.prompts import Batch, Prompt, batches
from layercache.calibration.replay import ReplayableTransformer
from layercache.errors import StatsError
from layercache.models.adapters import adapter_for, blocks_of
from layercache.models.fingerprint import model_fingerprint, setting_of
from layercache.stats import CalibrationStats, Group


def calibrate(
    pipe: Any,
    prompts: Sequence[Prompt],
    *,
    num_inference_steps: int = 50,
    groups: int | Sequence[Group] | None = 4,
    lags: int = 8,
    seed: int = 0,
    batch_size: int = 1,
    sketch_size: int = 1024,
    call_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> CalibrationStats:
    """Measure, per prompt, what `compile_plan` needs; once for every later budget and solver.

    For each prompt the pipeline runs at full compute. At step t, group g is also replaced by the
    residual it had at step t - lag, for lag = 1..M, while earlier groups return what they returned
    and later ones compute; the change of the guided output is the velocity delta D[t, g, lag].
    Velocities and deltas are kept as sketches (`CountSketch`).

    Args:
        pipe: A diffusers pipeline whose `transformer` has an adapter.
        prompts: Strings, or mappings of pipeline arguments (for pipelines without a text encoder).
            Four are enough for a useful plan.
        num_inference_steps: T, as the plan will be served.
        groups: How many groups of blocks, or the groups, or None for one a block.
        lags: M, the longest lag measured. Time grows by G M / 2 forwards a step at most.
        seed: With the prompt, it seeds the starting noise.
        batch_size: Prompts a pipeline call (strings only).
        sketch_size: S; the relative error of an inner product is about sqrt(2 / S).
        call_kwargs: More pipeline arguments, such as guidance and resolution, as served.
        progress: Show a progress bar on stderr.

    Returns:
        Statistics of the prompts, in the order of their identities.

    Raises:
        UnsupportedModelError: The transformer has no adapter.
        StatsError: The prompts, groups or lags make no sense, the pipeline cannot be replayed, or
            the run overflowed.

    Example:
        >>> from layercache.reference import call_arguments, load_pipeline, prompts
        >>> arguments = call_arguments()
        >>> del arguments["generator"], arguments["num_inference_steps"]
        >>> stats = calibrate(
        ...     load_pipeline(), prompts("calibration", 1), num_inference_steps=4, lags=2,
        ...     call_kwargs=arguments, progress=False,
        ... )
        >>> stats.deltas.shape
        (1, 4, 4, 2, 1024)
    """
    if num_inference_steps < 1 or lags < 1 or batch_size < 1 or sketch_size < 1:
        raise StatsError(
            f"num_inference_steps={num_inference_steps}, lags={lags}, batch_size={batch_size}, "
            f"sketch_size={sketch_size}: each must be at least 1"
        )
    adapter = adapter_for(pipe.transformer)
    counts = {b.name: len(blocks_of(pipe.transformer, b)) for b in adapter.block_lists}
    chosen = split_groups(counts, groups)
    arguments = {**(call_kwargs or {}), "num_inference_steps": num_inference_steps}
    work = batches(prompts, seed, batch_size, arguments)
    model = model_fingerprint(pipe.transformer)
    parts = []
    bar = tqdm(
        total=len(prompts) * num_inference_steps,
        unit="step",
        desc="calibrate",
        disable=not progress,
    )
    with bar, torch.no_grad():
        for batch in work:
            size = len(batch.ids)
            replayable = ReplayableTransformer(pipe.transformer, adapter, chosen, lags)
            try:
                measured = collect(
                    pipe,
                    batch,
                    replayable,
                    num_inference_steps,
                    sketch_size,
                    seed,
                    functools.partial(bar.update, size),
                )
            finally:
                replayable.remove()
            setting = setting_of(pipe, arguments)
            parts.append(_stats(batch, measured, chosen, seed, model, setting))
    return functools.reduce(CalibrationStats.merge, parts)


def _stats(
    batch: Batch,
    measured: Measured,
    groups: tuple[Group, ...],
    seed: int,
    model: dict[str, Any],
    setting: dict[str, Any],
) -> CalibrationStats:
    order = sorted(range(len(batch.ids)), key=batch.ids.__getitem__)
    return CalibrationStats(
        sigmas=np.array(measured.sigmas),
        groups=groups,
        branches=measured.branches,
        velocities=measured.velocities[order],
        deltas=measured.deltas[order],
        times_ms=measured.times_ms[order],
        image_gain=measured.image_gain[order],
        amplification=measured.amplification[order],
        group_bytes=measured.group_bytes,
        velocity_bytes=measured.velocity_bytes,
        output_bytes=measured.output_bytes,
        numel=measured.numel,
        sketch_seed=seed,
        prompt_ids=tuple(batch.ids[i] for i in order),
        model=model,
        setting=setting,
    )
