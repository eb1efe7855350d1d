"""The parts of a plan besides its rows: for which model, what was asked, foretold and proven."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from layercache import costs
from layercache._plan_rows import Frozen
from layercache.errors import PlanError
from layercache.stats import CalibrationStats


class ModelFingerprint(Frozen):
    """What must match exactly: the transformer's class, its block lists and its architecture."""

    class_name: str
    block_lists: dict[str, int]
    architecture: str


class Budget(Frozen):
    """What a plan may spend: a share of the transformer's compute, or the speedup to reach.

    Args:
        fraction: Share of full transformer compute, in (0, 1].
        speedup: Least predicted speedup of the whole generation, at least 1.

    Exactly one is given. `Budget.parse` also reads `"1.37x"` and `0.73`.

    Example:
        >>> Budget.parse("2x")
        Budget(fraction=None, speedup=2.0)
    """

    fraction: float | None = Field(default=None, gt=0, le=1)
    speedup: float | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if (self.fraction is None) == (self.speedup is None):
            raise ValueError("give exactly one of fraction and speedup")
        return self

    @classmethod
    def parse(cls, value: Budget | float | str) -> Budget:
        """Read `Budget(...)`, a share such as 0.73, or a speedup such as "1.37x".

        Raises:
            PlanError: The value is none of these.
        """
        if isinstance(value, Budget):
            return value
        text = str(value).strip().lower()
        try:
            if text.endswith("x"):
                return cls(speedup=float(text[:-1]))
            return cls(fraction=float(text))
        except ValueError as error:
            raise PlanError(
                f"budget {value!r} cannot be read: give a share in (0, 1] such as 0.73, "
                'a speedup of at least 1 such as "1.37x", or a Budget'
            ) from error

    def limit_ms(self, stats: CalibrationStats) -> float:
        """Milliseconds that the transformer may take for all steps."""
        return costs.budget_ms(stats, fraction=self.fraction, speedup=self.speedup)

    def __str__(self) -> str:
        if self.speedup is not None:
            return f"{self.speedup:g}x"
        return f"{self.fraction:.3f} of the compute"


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
