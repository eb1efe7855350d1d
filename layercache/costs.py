"""What plans cost: milliseconds, speedup and bytes, each formula once.

A computed step t takes `group_ms[g] * loads[t, g]` for each group g, and `rest_ms * loads[t, -1]`
for the rest of the transformer; loads are shares of the fullest step, 0 where another expert of the
pipeline makes the step. The uncached run makes the calls of each step `passes` times, of the last
one once.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from layercache._plan_rows import Schedule
from layercache.stats import CalibrationStats, FloatArray

STEP = "step"
"""Name of the step unit's schedule."""


def cell_ms(stats: CalibrationStats) -> FloatArray:
    """(T, G+1) milliseconds of each group, then of the rest of the transformer, at each step."""
    times: FloatArray = np.append(stats.group_ms, stats.rest_ms) * stats.loads
    return times


def full_ms(stats: CalibrationStats) -> float:
    """Milliseconds of the transformer in the uncached run."""
    each = cell_ms(stats).sum(axis=1)
    return float(each.sum() + (stats.passes - 1) * each[:-1].sum())


def overhead_ms(stats: CalibrationStats) -> float:
    """Milliseconds of all steps outside the transformer, whether they are computed or not."""
    return (stats.passes * (stats.num_steps - 1) + 1) * stats.overhead_ms


def budget_ms(
    stats: CalibrationStats, *, fraction: float | None = None, speedup: float | None = None
) -> float:
    """Milliseconds that the transformer may take: a share of all, or what a speedup leaves."""
    if speedup is None:
        return (fraction or 0.0) * full_ms(stats)
    outside = overhead_ms(stats)
    return (full_ms(stats) + outside) / speedup - outside


def speedup_of(stats: CalibrationStats, spent_ms: float) -> float:
    """How many times faster a generation is whose transformer takes `spent_ms`."""
    outside = overhead_ms(stats)
    return (full_ms(stats) + outside) / (spent_ms + outside)


def spent_ms(stats: CalibrationStats, schedules: Mapping[str, Schedule]) -> float:
    """Milliseconds of the transformer under a plan's schedules, by unit name.

    Groups without a schedule are computed wherever the step is.
    """
    times = cell_ms(stats)
    everything = (True,) * stats.num_steps
    run = schedules[STEP].computed if STEP in schedules else everything
    spent = float(times[np.array(run), -1].sum())
    for index, group in enumerate(stats.groups):
        own = schedules[group.name].computed if group.name in schedules else run
        spent += float(times[np.array(own), index].sum())
    return spent


def peak_bytes(
    schedules: Mapping[str, Schedule],
    group_bytes: Mapping[str, int],
    velocity_bytes: int,
    output_bytes: int,
) -> int:
    """Peak bytes of all tensors that the runtime holds between steps, for one image.

    A value is held from the step that computes it to the last one that reads it. Where a step is
    skipped, the mean m_a is held besides, and the outputs of all branches, from the computed step
    before to the last skipped one.
    """
    steps = len(next(iter(schedules.values())).computed) if schedules else 0
    peak = 0
    for step in range(steps):
        held = 0
        for name, schedule in schedules.items():
            count = schedule.stored_at(step)
            if name != STEP:
                held += count * group_bytes[name]
            else:
                held += count * velocity_bytes
                if schedule.pauses_at(step):
                    held += velocity_bytes + output_bytes
        peak = max(peak, held)
    return peak


def cache_bytes(stats: CalibrationStats, schedules: Mapping[str, Schedule]) -> int:
    """`peak_bytes` with the sizes that calibration measured."""
    sizes = {group.name: size for group, size in zip(stats.groups, stats.group_bytes, strict=True)}
    return peak_bytes(schedules, sizes, stats.velocity_bytes, stats.output_bytes)
