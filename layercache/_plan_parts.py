"""The parts of a plan besides its rows: for which model, what was asked, foretold and proven."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from layercache import costs
from layercache._plan_rows import Frozen
from layercache.errors import PlanError
from layercache.stats import CalibrationStats, FloatArray


class ModelFingerprint(Frozen):
    """What must match exactly: the transformer's class, its block lists and its architecture."""

    class_name: str
    block_lists: dict[str, int]
    architecture: str


_MEDIAN = 0.5
_NO_ERROR = 1000.0
"""Decibels in place of infinitely many, which have no quantiles."""
_BARE = 10
"""Text of a larger number has to say what it means."""
_QUALITY = re.compile(r"(\S+?) ?db(?:@(\S+))?")


class Budget(Frozen):
    """What a plan may spend: a share of the compute, the speedup to reach, or the quality to keep.

    Args:
        fraction: Share of full transformer compute, in (0, 1].
        speedup: Least predicted speedup of the whole generation, at least 1.
        psnr_db: Least PSNR in dB to the uncached image that is to be foretold, above 0 and at most
            150 (beyond it decibels are rounding).
        quantile: At which quantile over calibration prompts `psnr_db` is to be foretold, from 0
            (the worst prompt) to 1: 0.1 lets a tenth of them be worse. Default with `psnr_db`:
            0.5, the median.

    Exactly one of the first three is given. `Budget.parse` also reads `"1.37x"`, `0.73` and
    `"40dB"`.

    Example:
        >>> Budget.parse("2x")
        Budget(speedup=2.0)
        >>> Budget.parse("40dB@10%")
        Budget(psnr_db=40.0, quantile=0.1)
    """

    fraction: float | None = Field(default=None, gt=0, le=1)
    speedup: float | None = Field(default=None, ge=1)
    psnr_db: float | None = Field(default=None, gt=0, le=150)
    quantile: float | None = Field(default=None, ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _median(cls, data: Any) -> Any:
        """With the quantile that `psnr_db` alone means."""
        if isinstance(data, dict) and data.get("psnr_db") is not None:
            return data | {
                "quantile": _MEDIAN if data.get("quantile") is None else data["quantile"]
            }
        return data

    @model_validator(mode="after")
    def _one(self) -> Budget:
        given = [self.fraction, self.speedup, self.psnr_db]
        if sum(value is not None for value in given) != 1:
            raise ValueError("give exactly one of fraction, speedup and psnr_db")
        if self.psnr_db is None and self.quantile is not None:
            raise ValueError("quantile goes with psnr_db")
        return self

    @classmethod
    def parse(cls, value: Budget | float | str) -> Budget:
        """Read `Budget(...)` or one of the short forms, as numbers or as text.

        A share is `0.73` or `"73%"`, a speedup `"1.37x"` or any number above 1 (as text without a
        unit up to 10), and a quality `"40dB"` in the median or `"40dB@10%"` for all but a tenth of
        the prompts. 1 is everything.

        Raises:
            PlanError: The value is none of these.
        """
        if isinstance(value, Budget):
            return value
        text = str(value).strip().lower()
        try:
            quality = _QUALITY.fullmatch(text)
            if quality is not None:
                return cls(
                    psnr_db=float(quality[1]),
                    quantile=_share(quality[2]) if quality[2] else _MEDIAN,
                )
            if text.endswith("x"):
                return cls(speedup=float(text[:-1]))
            share = _share(text)
            if isinstance(value, str) and _BARE < share < math.inf and "%" not in text:
                raise PlanError(f"budget {value!r} has no unit: write {text}x, {text}% or {text}dB")
            # More than everything is no share, unless somebody wrote it as one.
            return cls(speedup=share) if share > 1 and "%" not in text else cls(fraction=share)
        except PlanError:
            raise
        except ValueError as error:
            raise PlanError(
                f"budget {value!r} cannot be read: give a share in (0, 1] such as 0.73 or 73%, a "
                "speedup of at least 1 such as 1.37x, or a quality such as 40dB or 40dB@10%"
            ) from error

    @property
    def text(self) -> str:
        """The short form, which `parse` reads."""
        if self.speedup is not None:
            return f"{self.speedup:.15g}x"
        if self.psnr_db is None:
            return f"{self.fraction:.15g}"
        at = "" if self.quantile == _MEDIAN else f"@{100 * (self.quantile or 0):.15g}%"
        return f"{self.psnr_db:.15g}dB{at}"

    def limit_ms(self, stats: CalibrationStats) -> float:
        """Milliseconds that the transformer may take for all steps; no limit for a quality."""
        if self.psnr_db is not None:
            return math.inf
        return costs.budget_ms(stats, fraction=self.fraction, speedup=self.speedup)

    def kept_by(self, psnr: FloatArray) -> bool:
        """Whether (P,) PSNR in dB, of one image a prompt, keep `psnr_db` at the quantile."""
        reached = np.quantile(np.minimum(psnr, _NO_ERROR), self.quantile or 0.0)
        return self.psnr_db is None or bool(reached >= self.psnr_db)

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        return [pair for pair in super().__repr_args__() if pair[1] is not None]

    def __str__(self) -> str:
        if self.speedup is not None:
            return f"{self.speedup:g}x"
        if self.psnr_db is None:
            return f"{self.fraction:.3f} of the compute"
        which = "in the median"
        if self.quantile != _MEDIAN:
            which = f"for all but {100 * (self.quantile or 0):g} % of the prompts"
        return f"{self.psnr_db:g} dB {which}"


def _share(text: str) -> float:
    """`0.73` or `73%`."""
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


class Predicted(Frozen):
    """What the statistics foretell. None of it is a measurement of the running plan.

    `psnr_db`, `psnr_median_db` and `psnr_worst_db` are the mean, median and least over calibration
    prompts, against the uncached image; none is stated where nothing is cached. `cache_bytes` is
    the peak of all stored tensors for one image.
    """

    speedup: float
    compute_share: float
    psnr_db: float | None = None
    psnr_median_db: float | None = None
    psnr_worst_db: float | None = None
    cache_bytes: int


class Measured(Frozen):
    """What runs of the plan gave, beside the uncached ones of the same prompts and seeds.

    Attributes:
        speedup: Median time of the uncached generation over the plan's.
        psnr_db: Mean over images of the PSNR in dB against the uncached image.
        psnr_median_db: The median.
        psnr_tenth_db: A tenth of the images are worse.
        psnr_worst_db: The worst.
        ssim: Mean SSIM; None where nothing was decoded.
        changed: Share of images with an SSIM below 0.95: a person sees the difference.
        images: How many.
        batch_size: Images a pipeline call.
        device: On what.
        dtype: Of the transformer.
        calibration_prompts: Whether the prompts are those of the calibration.
    """

    speedup: float = Field(gt=0)
    psnr_db: float
    psnr_median_db: float
    psnr_tenth_db: float
    psnr_worst_db: float
    ssim: float | None = None
    changed: float | None = Field(default=None, ge=0, le=1)
    images: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    device: str
    dtype: str
    calibration_prompts: bool = False

    def __str__(self) -> str:
        text = (
            f"{self.speedup:.2f}x, PSNR {self.psnr_median_db:.1f} dB (a tenth below "
            f"{self.psnr_tenth_db:.1f}, worst {self.psnr_worst_db:.1f})"
        )
        if self.changed is not None:
            text += f", {100 * self.changed:.0f} % visibly changed"
        which = "calibration" if self.calibration_prompts else "other"
        return f"{text}; {self.images} images of {which} prompts, {self.device}, {self.dtype}"


class Certificate(Frozen):
    """What is known of how good the schedule is.

    Attributes:
        solver: What found it.
        objective: What was made small: the sum of `"prices"` of cached cells, or the `"score"`,
            the mean log10 of the squared error foretold of the final latent.
        value: Of the objective, as reached.
        lower_bound: A proven bound of the objective over all schedules within the budget, if there
            is one.
        starts: Of how many schedules a search began, the best of which this is.
    """

    solver: str
    objective: Literal["prices", "score"] = "prices"
    value: float
    lower_bound: float | None = None
    starts: int | None = None

    @property
    def gap(self) -> float | None:
        """Relative distance of the bound from the value; None without a bound."""
        if self.lower_bound is None:
            return None
        return max(0.0, self.value - self.lower_bound) / self.value if self.value > 0 else 0.0

    def __str__(self) -> str:
        text = f"{self.solver}, {self.objective} {self.value:.4g}"
        if self.starts is not None:
            text += f", best of {self.starts} starts, nothing proven"
        if self.lower_bound is not None:
            text += f", lower bound {self.lower_bound:.4g}, gap {100 * (self.gap or 0):.2f} %"
        return text
