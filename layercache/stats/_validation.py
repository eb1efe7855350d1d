"""What must hold within statistics, wherever they come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from layercache._json import require_plain
from layercache.errors import StatsError

if TYPE_CHECKING:
    from layercache.stats import CalibrationStats

ARRAYS = (
    "sigmas",
    "loads",
    "segments",
    "velocities",
    "latents",
    "deltas",
    "times_ms",
    "image_gain",
    "amplification",
    "responses",
    "response_sigmas",
)
"""The arrays of `CalibrationStats`."""
SHARED = ("sigmas", "loads", "segments", "response_sigmas")
"""Those that all prompts share."""
_MODES = ("replay", "residual")
_MOST = 1e12
"""Bound of all values, and of the inverses of those that must be positive. Products of a few stay
far from the ends of float64, and squares from those of float32."""


def check_stats(stats: CalibrationStats) -> None:
    """Refuse statistics whose parts do not fit one another, or that no plan can be made of.

    Raises:
        StatsError: The message names the field and what was expected.
    """
    for name in ("model", "setting", "component", "mode", "prompt_ids"):
        try:
            require_plain(getattr(stats, name), name)
        except ValueError as error:
            raise StatsError(str(error)) from error
    _check_shapes(stats)
    _check_finite(stats)
    _check_counts(stats)
    _check_values(stats)
    _check_groups(stats)
    ids = list(stats.prompt_ids)
    if len(ids) != stats.num_prompts or ids != sorted(set(ids)):
        raise StatsError("prompt_ids must be sorted, all different, and as many as the prompts")


def _check_shapes(stats: CalibrationStats) -> None:
    sigmas, groups = stats.sigmas, len(stats.groups)
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise StatsError(f"sigmas has shape {sigmas.shape}; it needs T+1 >= 2 values")
    steps = len(sigmas) - 1
    if stats.velocities.ndim != 3:
        raise StatsError(f"velocities has shape {stats.velocities.shape}; it must be (P, T, S)")
    prompts, _, size = stats.velocities.shape
    lags = stats.deltas.shape[3] if stats.deltas.ndim == 5 else 0
    expected = {
        "loads": (steps, groups + 1),
        "segments": (steps,),
        "velocities": (prompts, steps, size),
        "latents": (prompts, steps + 1, size),
        "deltas": (prompts, steps, groups, lags, size),
        "times_ms": (prompts, groups + 2),
        "image_gain": (prompts,),
        "amplification": (prompts, steps),
        "responses": (prompts, stats.response_sigmas.size, groups * (groups - 1) // 2, 3),
        "response_sigmas": (stats.response_sigmas.size,),
    }
    for name, shape in expected.items():
        array = getattr(stats, name)
        if array.shape != shape:
            raise StatsError(f"{name} has shape {array.shape}; {shape} was expected")


def _check_finite(stats: CalibrationStats) -> None:
    for name in ARRAYS:
        if not np.isfinite(getattr(stats, name)).all():
            raise StatsError(
                f"{name} holds NaN or infinity: the calibration run overflowed; "
                "calibrate again in float32 or bfloat16"
            )
        if np.abs(getattr(stats, name)).max(initial=0) > _MOST:
            raise StatsError(
                f"{name} holds {np.abs(getattr(stats, name)).max():.3g}, more than {_MOST:g}: the "
                "calibration run overflowed; calibrate again in float32 or bfloat16"
            )


def _check_counts(stats: CalibrationStats) -> None:
    if not (np.diff(stats.sigmas) < 0).all() or stats.sigmas[-1] != 0:
        raise StatsError("sigmas must fall strictly and end at 0; the schedule is malformed")
    prompts, _, size = stats.velocities.shape
    counts = {
        "prompts": prompts,
        "lags": stats.max_lag,
        "sketch_size": size,
        "branches": stats.branches,
        "numel": stats.numel,
    }
    if min(counts.values()) < 1:
        given = ", ".join(f"{name}={count}" for name, count in counts.items())
        raise StatsError(f"{given}: each must be at least 1")
    if stats.mode not in _MODES or stats.probes < 0:
        raise StatsError(
            f"mode is {stats.mode!r} and probes {stats.probes}; the modes are "
            f"{' and '.join(map(repr, _MODES))}, and probes cannot be negative"
        )
    if stats.passes not in (1, 2):
        raise StatsError(f"passes is {stats.passes}; the calls of a step are made once or twice")


def _check_values(stats: CalibrationStats) -> None:
    if (stats.times_ms < 0).any():
        raise StatsError("times_ms must not be negative")
    if not (stats.times_ms[:, :-1] > 0).any(axis=1).all():
        raise StatsError("times_ms is 0 throughout for a prompt; every transformer takes time")
    for name in ("image_gain", "amplification"):
        if (getattr(stats, name) < 1 / _MOST).any():
            raise StatsError(f"{name} is {getattr(stats, name).min():.3g}; it must be positive")
    if (stats.responses[..., 1:] < 0).any():
        raise StatsError("responses holds a squared norm below 0; the file is malformed")
    if (np.diff(stats.response_sigmas) >= 0).any():
        raise StatsError("response_sigmas must fall strictly; the file is malformed")
    if (stats.loads < 0).any() or (stats.loads > 1).any() or not (stats.loads == 1).any():
        raise StatsError("loads are shares of the fullest step: from 0 to 1, and 1 somewhere")
    if stats.segments[0] != 0 or not np.isin(np.diff(stats.segments), (0, 1)).all():
        raise StatsError("segments must count up from 0 by 0 or 1 a step")
    if len(stats.group_bytes) != len(stats.groups):
        raise StatsError(
            f"group_bytes has {len(stats.group_bytes)} values for {len(stats.groups)} groups"
        )
    for name in ("group_bytes", "velocity_bytes", "output_bytes"):
        if np.min(getattr(stats, name), initial=0) < 0:
            raise StatsError(f"{name} is {getattr(stats, name)}; bytes cannot be negative")


def _check_groups(stats: CalibrationStats) -> None:
    ends: dict[str, int] = {}
    for group in stats.groups:
        if group.start < ends.get(group.block_list, 0):
            raise StatsError(f"group {group.name} overlaps or precedes a group before it")
        ends[group.block_list] = group.stop


def require_each(path: str, name: str, values: Any, kind: type) -> None:
    """Refuse what is no list of one JSON type, such as numbers written as text."""
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        raise StatsError(
            f"{path}: its metadata is malformed ({name} is {str(values)[:80]}; each must be "
            f"{kind.__name__})"
        )
