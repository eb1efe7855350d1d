"""`trial`: run a few plans for real, keep the best at equal time, and say what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from layercache.calibration.prompts import Prompt, batches
from layercache.errors import LayerCacheError, PlanError
from layercache.evaluation._compare import Comparison, compare
from layercache.evaluation.methods import LayerCache
from layercache.evaluation.metrics import fidelity
from layercache.plan import Measured, Plan

CHANGED_SSIM = 0.95
"""Images below it count as visibly changed."""
EQUAL_TIME = 0.05
"""Plans so much slower than the fastest still count as equally fast: timings scatter."""


@dataclass(frozen=True, eq=False)
class Trial:
    """What a trial found.

    Attributes:
        plans: The plans by name, each with what was measured of it.
        best: The name of the one with the highest mean PSNR among those that are equally fast.
        comparison: The table and the images.
    """

    plans: Mapping[str, Plan]
    best: str
    comparison: Comparison

    @property
    def plan(self) -> Plan:
        """The best plan."""
        return self.plans[self.best]


def generations(plans: int, prompts: int, repeats: int = 1) -> int:
    """How many generations a trial takes: each prompt uncached and under every plan."""
    return (plans + 1) * prompts * repeats


def trial(
    pipe: Any,
    plans: Mapping[str, Plan],
    prompts: Sequence[Prompt],
    *,
    call_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 1,
    repeats: int = 1,
    calibration_prompts: bool = True,
    progress: bool = True,
) -> Trial:
    """Run plans on prompts, beside the uncached pipeline.

    A statistic foretells plans of different kinds (whole steps, groups, both) with different
    truth; a run of each decides. It costs about one generation a plan and prompt, and one more a
    prompt (`generations`).

    Args:
        pipe: A pipeline that the plans fit.
        plans: Plans for one budget and schedule, by name, such as `choices.candidates` gives.
        prompts: Captions, or mappings of pipeline arguments; those of the calibration will do.
        call_kwargs: Pipeline arguments, such as guidance and resolution, as served.
        seed: With each prompt, it seeds the starting noise.
        batch_size: Prompts a pipeline call.
        repeats: Timed rounds a batch.
        calibration_prompts: Whether the prompts are those of the calibration; plans say so.
        progress: Show a progress bar on stderr.

    Raises:
        PlanError: There are no plans, or they are for different schedules.
        ModelMismatchError: A plan is for another model or schedule than the pipeline's.

    Example:
        >>> found = trial(pipe, candidates(stats, "2x"), prompts)  # doctest: +SKIP
        >>> found.plan.measured.psnr_median_db  # doctest: +SKIP
        61.2
    """
    if not plans or not prompts:
        raise PlanError("a trial needs at least one plan and one prompt")
    first = next(iter(plans.values()))
    if any(plan.sigmas != first.sigmas for plan in plans.values()):
        raise PlanError("a trial compares plans for one schedule; these have different sigmas")
    arguments = {**(call_kwargs or {}), "num_inference_steps": first.num_steps}
    comparison = compare(
        pipe,
        batches(prompts, seed, batch_size, arguments),
        {1.0: [LayerCache(plan, name) for name, plan in plans.items()]},
        repeats=repeats,
        progress=progress,
    )
    made = {
        name: plan.model_copy(
            update={"measured": measured(pipe, plan, comparison, name, calibration_prompts)}
        )
        for name, plan in plans.items()
    }
    seen = {name: plan.measured for name, plan in made.items() if plan.measured is not None}
    fastest = max(found.speedup for found in seen.values())
    fair = {n: found for n, found in seen.items() if found.speedup >= fastest * (1 - EQUAL_TIME)}
    best = max(fair, key=lambda name: fair[name].psnr_db)
    return Trial(made, best, comparison)


def measured(
    pipe: Any, plan: Plan, comparison: Comparison, name: str, calibration_prompts: bool
) -> Measured:
    """One row of a comparison, as plans carry it.

    Raises:
        LayerCacheError: The comparison has no such row.
    """
    row = next((row for row in comparison.rows if row.method == name), None)
    if row is None:
        raise LayerCacheError(f"the comparison has no method {name!r}")
    images = comparison.images[name, row.target_speedup]
    found = fidelity(images, comparison.references, decoded=comparison.decoded)
    changed = None
    if found.ssim is not None:
        changed = sum(value < CHANGED_SSIM for value in found.ssim) / len(found.ssim)
    transformer = getattr(pipe, plan.component)
    return Measured(
        speedup=row.speedup_measured,
        psnr_db=found.psnr_mean,
        psnr_median_db=found.psnr_median,
        psnr_tenth_db=float(np.quantile(found.psnr_db, 0.1)),
        psnr_worst_db=found.psnr_worst,
        ssim=found.ssim_mean,
        changed=changed,
        images=len(images),
        batch_size=comparison.batch_size,
        device=_device(next(transformer.parameters()).device),
        dtype=str(getattr(transformer, "dtype", "unknown")).removeprefix("torch."),
        calibration_prompts=calibration_prompts,
    )


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{device.type}{threads}"
