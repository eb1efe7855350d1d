"""`sigmas_for`: the noise levels of another step count, shift or size. Needs no torch.

The flow-matching pipelines of diffusers begin with T levels that fall evenly from (about) 1,

    u_t = u_first - (u_first - u_last) t / (T - 1),    t = 0 .. T-1,

and shift them towards the noise: s u / (1 + (s - 1) u). The shift s is a number of the scheduler's
configuration, or ("dynamic") follows from the size: mu is linear in the image tokens, and s is
exp(mu), or mu itself. Some stretch the result to end at a terminal level. Then 0 is appended.

Which of these a calibration used is found by trying: a form is taken if it gives the calibrated
levels back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from layercache.errors import StatsError
from layercache.stats import CalibrationStats, FloatArray

_MU_TOLERANCE = 1e-3
TOLERANCE = 1e-4
"""Largest difference of a level; the runtime takes levels for the same up to this, too."""
_SMALLEST = 1 / 1000
"""Level of the first of the training's timesteps."""
_ADVICE = "pass the noise levels themselves (--sigmas, or sigmas=)"

Ends = Callable[[int, float], tuple[float, float]]
"""(T, s) to the first and the last of the even levels."""
_ENDS: tuple[Ends, ...] = (
    # What most pipelines hand to their scheduler.
    lambda steps, shift: (1.0, 1 / steps),
    # Where the scheduler fills in: to the smallest level of training, itself shifted already.
    lambda steps, shift: (1.0, _shifted(_SMALLEST, shift)),
    # The same where the shift follows from the size, and training knew none.
    lambda steps, shift: (1.0, _SMALLEST),
    # UniPC: T+1 levels to the smallest one, which is left out.
    lambda steps, shift: (1.0, 1 - (1 - _SMALLEST) * (steps - 1) / steps),
    # DPM++: T+1 levels to 0, which is left out.
    lambda steps, shift: (1 - _SMALLEST, (1 - _SMALLEST) / steps),
)


@dataclass(frozen=True)
class _Form:
    """How noise levels are made."""

    ends: Ends
    terminal: float
    """The last level before 0; 0 where none is asked for."""

    def levels(self, steps: int, shift: float) -> FloatArray:
        """(T+1,) levels."""
        levels = _shifted(np.linspace(*self.ends(steps, shift), steps), shift)
        if self.terminal and steps > 1:
            levels = 1 - (1 - levels) * (1 - self.terminal) / (1 - levels[-1])
        return np.append(levels, 0.0)

    def shift_of(self, levels: FloatArray, guess: float) -> float:
        """The shift of (T+1,) levels; `guess` says where the even levels end.

        Stretching leaves the ratios of 1 - level as they are, and the ratio of two of them is one
        linear equation in s - 1.
        """
        steps = len(levels) - 1
        even = np.linspace(*self.ends(steps, guess), steps)
        u, last = even[steps // 2], even[-1]
        with np.errstate(all="ignore"):
            if not self.terminal or steps < 3:
                return float(levels[steps // 2] * (1 - u) / (u * (1 - levels[steps // 2])))
            ratio = (1 - levels[steps // 2]) / (1 - levels[-2])
            return float(
                1 + ((1 - u) - ratio * (1 - last)) / (ratio * (1 - last) * u - (1 - u) * last)
            )


def sigmas_for(
    stats: CalibrationStats,
    *,
    steps: int | None = None,
    shift: float | None = None,
    size: tuple[int, int] | None = None,
) -> tuple[float, ...]:
    """The noise levels that the calibrated pipeline uses at another step count, shift or size.

    Args:
        stats: What calibration measured.
        steps: Number of steps T; the calibrated one by default.
        shift: The scheduler's shift s.
        size: Width and height in pixels. Where the shift does not follow from the size, it changes
            nothing.

    Returns:
        T+1 levels, from near 1 to 0, for `Options.sigmas`.

    Raises:
        StatsError: The calibrated levels are of no form that is known, or what a size does to them
            is not known; the message says what to pass instead.

    Example:
        >>> sigmas = sigmas_for(stats, steps=28, size=(1328, 800))  # doctest: +SKIP
        >>> plan = compile_plan(stats, "2x", sigmas=sigmas)  # doctest: +SKIP
    """
    _check(steps, shift, size)
    form, found = _recognised(stats)
    if shift is None and stats.setting.get("scheduler_use_dynamic_shifting"):
        shift = _shift_at(stats, found, size)
    levels = form.levels(steps or stats.num_steps, found if shift is None else shift)
    return tuple(levels.tolist())


def _check(steps: int | None, shift: float | None, size: tuple[int, int] | None) -> None:
    if steps is not None and steps < 1:
        raise StatsError(f"steps is {steps}; it must be at least 1")
    if shift is not None and not (math.isfinite(shift) and shift > 0):
        raise StatsError(f"shift is {shift}; it must be above 0")
    if size is not None and min(size) < 1:
        raise StatsError(f"size is {size}; it must be width and height in pixels")
    if size is not None and shift is not None:
        raise StatsError("give shift or size, not both: a size says what the shift is")


def _shifted(even: Any, shift: float) -> Any:
    return shift * even / (1 + (shift - 1) * even)


def _recognised(stats: CalibrationStats) -> tuple[_Form, float]:
    """The form that gives the calibrated levels back, and their shift."""
    levels = np.asarray(stats.sigmas, dtype=np.float64)
    best = math.inf
    for form, shift in _candidates(stats, levels):
        with np.errstate(all="ignore"):
            worst = float(np.abs(form.levels(stats.num_steps, shift) - levels).max())
        if worst <= TOLERANCE:
            return form, shift
        best = min(best, worst if math.isfinite(worst) else math.inf)
    raise StatsError(
        "the calibrated noise levels are of no form that is known (the nearest is off by "
        f"{best:.2g}): {_ADVICE}"
    )


def _candidates(stats: CalibrationStats, levels: FloatArray) -> Iterator[tuple[_Form, float]]:
    terminal = _number(stats, "scheduler_shift_terminal")
    stated = _number(stats, "scheduler_shift") or _number(stats, "scheduler_flow_shift") or 1.0
    forms = [_Form(ends, terminal) for ends in _ENDS]
    if not stats.setting.get("scheduler_use_dynamic_shifting"):
        yield from ((form, stated) for form in forms)
    for form in forms:
        fitted = form.shift_of(levels, stated)
        if math.isfinite(fitted) and fitted > 0:
            yield form, fitted


def _number(stats: CalibrationStats, name: str, default: float = 0.0) -> float:
    value = stats.setting.get(name)
    return float(value) if isinstance(value, int | float) else default


# -- sizes -----------------------------------------------------------------------------------------


def resized(stats: CalibrationStats, size: tuple[int, int]) -> CalibrationStats:
    """The same measurements, said to be of another size; `setting` keeps the calibrated one too.

    Args:
        stats: What calibration measured.
        size: Width and height in pixels.

    Raises:
        StatsError: The calibrated size is not known, or the latents of the new one would be no
            whole number.
    """
    shape, setting = stats.setting.get("latent_shape"), dict(stats.setting)
    width, height = _calibrated_size(stats)
    named: dict[str, Any] = {"width": size[0], "height": size[1]}
    if isinstance(shape, list) and len(shape) == 2:
        setting["latent_shape"] = [_scaled(shape[0], stats, size), shape[1]]
    elif isinstance(shape, list) and len(shape) > 2:
        # Each side by itself: their product may be whole where they are not.
        high = _scaled(shape[-2], stats, (width, size[1]))
        setting["latent_shape"] = [*shape[:-2], high, _scaled(shape[-1], stats, (size[0], height))]
    if isinstance(setting.get("call"), dict):
        setting["call"] = setting["call"] | named
    setting |= named | {"pixels": list(size), "calibrated_pixels": [width, height]}
    return replace(stats, setting=setting)


def _calibrated_size(stats: CalibrationStats) -> tuple[int, int]:
    pixels = stats.setting.get("pixels")
    width, height = (
        pixels
        if isinstance(pixels, list) and len(pixels) == 2
        else (stats.setting.get("width"), stats.setting.get("height"))
    )
    if not isinstance(width, int) or not isinstance(height, int) or min(width, height) < 1:
        raise StatsError(
            "the statistics do not say which size was calibrated: calibrate with height and width "
            f"in the call, or {_ADVICE}"
        )
    return width, height


def _scaled(count: int, stats: CalibrationStats, size: tuple[int, int]) -> int:
    """So many image tokens, or latents, at another size."""
    width, height = _calibrated_size(stats)
    scaled = Fraction(count * size[0] * size[1], width * height)
    if scaled.denominator != 1:
        raise StatsError(
            f"a size of {size[0]}x{size[1]} has no whole number of latents ({width}x{height} has "
            f"{count}): give the size that the pipeline rounds it to"
        )
    return int(scaled)


def _shift_at(stats: CalibrationStats, shift: float, size: tuple[int, int] | None) -> float:
    """The shift at a size, where it follows from the image tokens.

    The calibrated one is held against the rule first: some pipelines have rules of their own, in
    which the step count stands as well.
    """
    linear = stats.setting.get("scheduler_time_shift_type") == "linear"
    mu = shift if linear else math.log(shift)
    tokens = next((n for n in _tokens(stats) if abs(_mu(stats, n) - mu) < _MU_TOLERANCE), None)
    if tokens is None:
        raise StatsError(
            f"the calibrated shift ({shift:.4g}) does not follow from the image tokens by the rule "
            f"of the scheduler's configuration, so it is not known at another step count or size: "
            f"{_ADVICE}"
        )
    if size is None:
        return shift
    mu = _mu(stats, _scaled(tokens, stats, size))
    return mu if linear else math.exp(mu)


def _tokens(stats: CalibrationStats) -> Iterator[int]:
    """How many image tokens there may be: packed latents have one a row, others a square patch."""
    shape = stats.setting.get("latent_shape")
    if not isinstance(shape, list) or not all(isinstance(n, int) for n in shape):
        return
    if len(shape) == 2:
        yield shape[0]
    elif len(shape) > 2:
        for patch in (1, 2, 4):
            if not shape[-1] % patch and not shape[-2] % patch:
                yield math.prod(shape[1:]) // patch**2


def _mu(stats: CalibrationStats, tokens: float) -> float:
    """The rule of diffusers' `calculate_shift`, with its defaults."""
    base = _number(stats, "scheduler_base_shift", 0.5)
    most = _number(stats, "scheduler_max_shift", 1.15)
    few = _number(stats, "scheduler_base_image_seq_len", 256)
    many = _number(stats, "scheduler_max_image_seq_len", 4096)
    return base + (most - base) * (tokens - few) / (many - few)
