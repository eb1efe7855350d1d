"""`refine_plan`: the step taps of a plan, fitted again on the accelerated run itself.

Compiling foretells errors around the uncached run. The accelerated run drifts away from it, and at
few computed steps what is foretold is no longer what happens. Here the calibration prompts are
generated once in full, and once under the plan, all prompts in one pipeline call. At every computed
step a, just before its velocity is used, the mean velocity until the next computed step e

    m_a = u_a + sum_h b_h (u_a - u_{a_h}),      a_h the h-th computed step before a,

is fitted to where the uncached run is at e (`prediction.ridge`): target (z_e - x_a) / (sigma_e -
sigma_a), prior the compiled taps. The run goes on from what the fit gives, so that errors made
before are seen, and paid back, by later fits. Which cells are computed stays as it was.

Cost: 1 generation in full and 3 under the plan, of all prompts; one more under the plan for each
earlier velocity that a memory limit forbids. The plan's figures are computed again from the
statistics and verified; whether refining helped is measured on the same prompts, and if it did not,
the compiled plan comes back.

Source: the closed loop is that of fitting a non-stationary solver (Shaul et al., arXiv 2403.01329)
row by row.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layercache.calibration.prompts import Batch, Prompt, batches
from layercache.costs import cache_bytes
from layercache.errors import LayerCacheError, ModelMismatchError, StatsError
from layercache.evaluation.metrics import latent_psnr, psnr
from layercache.models.pipelines import decodes, run_pipeline
from layercache.models.stepping import moved_sample, tapped_step
from layercache.plan import Budget, Plan, UnitPlan
from layercache.prediction import DEPTH, predicted_psnr
from layercache.prediction.error import moves_as_euler
from layercache.prediction.ridge import DECIMALS, fit_row
from layercache.runtime import StepExecutor, apply_plan
from layercache.runtime.arithmetic import affine
from layercache.stats import CalibrationStats
from layercache.stats.resample import resample
from layercache.verify import recompute, verify

Array = NDArray[np.float64]


def refine_plan(
    pipe: Any,
    plan: Plan,
    stats: CalibrationStats,
    prompts: Sequence[Prompt],
    *,
    seed: int = 0,
    call_kwargs: Mapping[str, Any] | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> Plan:
    """The plan with step taps fitted in closed loop; the plan itself where that does no good.

    Args:
        pipe: The pipeline that the plan is for.
        plan: A compiled plan with fitted taps that caches something.
        stats: The statistics that it was compiled from.
        prompts: At least two strings that one pipeline call can take together; those of the
            calibration do.
        seed: With the prompt, it seeds the starting noise; see `calibrate`.
        call_kwargs: More pipeline arguments, as served.
        log: Receives a line on what was measured.

    Returns:
        A plan of the same cells. `provenance["refined"]` tells the prompts, and mean PSNR in dB on
        them before and after.

    Raises:
        LayerCacheError: The plan has nothing to refine.
        StatsError: The prompts do not make one pipeline call.
        ModelMismatchError: The plan is for another model or noise schedule.

    Example:
        >>> plan = compile_plan(stats, "3x")  # doctest: +SKIP
        >>> plan = refine_plan(pipe, plan, stats, prompts, call_kwargs=setting)  # doctest: +SKIP
        >>> plan.provenance["refined"]["psnr_db_after"]  # doctest: +SKIP
        51.0
    """
    _check(stats, plan)
    arguments = {**(call_kwargs or {}), "num_inference_steps": plan.num_steps}
    work = batches(prompts, seed, len(prompts), arguments)
    if len(prompts) < 2 or len(work) > 1:
        raise StatsError(
            f"{len(prompts)} prompts make {len(work)} pipeline calls; refining needs two prompts "
            "or more, as strings, that fit into one call"
        )
    (batch,) = work
    here = stats if plan.asked.sigmas is None else resample(stats, np.array(plan.asked.sigmas))
    limit, began = plan.asked.max_cache_bytes, time.perf_counter()
    with torch.no_grad():
        truth, reference = _uncached(pipe, batch, plan)
        before = after = _psnr(pipe, batch, plan, reference)
        refined = plan
        for depth in range(DEPTH, 0, -1):
            loop = ClosedLoop(plan, here, depth, truth)
            _run_closed(pipe, batch, plan, loop)
            fitted = _with_step(plan, loop.row())
            # Deeper taps hold values longer; where bytes are limited, shallower ones have to do.
            if limit is None or cache_bytes(here, fitted.schedules) <= limit:
                refined = _restated(stats, here, fitted)
                after = _psnr(pipe, batch, refined, reference)
                break
    better, seconds = after > before, time.perf_counter() - began
    log(
        f"refined on {len(prompts)} prompts in {seconds:.0f} s: {before:.2f} dB before, "
        f"{after:.2f} dB after" + ("" if better else "; the compiled plan is kept")
    )
    found = refined if better else plan
    note = {
        "prompts": len(prompts),
        "prompts_sha256": hashlib.sha256("".join(sorted(batch.ids)).encode()).hexdigest(),
        "seed": seed,
        "psnr_db_before": before,
        "psnr_db_after": after,
        "kept": better,
    }
    return found.model_copy(update={"provenance": {**found.provenance, "refined": note}})


def _check(stats: CalibrationStats, plan: Plan) -> None:
    cached = [schedule.cached for schedule in plan.schedules.values()]
    if plan.asked.predictor != "fitted" or not any(map(any, cached)):
        raise LayerCacheError(
            f"this plan has nothing to refine: it caches {sum(map(sum, cached))} cells and its "
            f"predictor is {plan.asked.predictor!r}; compile one that caches, with "
            'predictor="fitted"'
        )
    if stats.passes > 1:
        raise LayerCacheError(
            "this plan is for a scheduler that calls the model twice a step, whose taps cannot be "
            "refined: use the plan as it was compiled"
        )


@dataclass(frozen=True)
class Truth:
    """The uncached run: z (P, N) at every step and at the end, and how the scheduler counts."""

    latents: Mapping[int, Array]
    lengths: Array

    def length(self, start: int, stop: int) -> float:
        """sigma_stop - sigma_start, in the scheduler's own direction."""
        return float(self.lengths[start:stop].sum())


class ClosedLoop(StepExecutor[Tensor]):
    """A step executor that fits each row of taps as the run reaches it.

    Args:
        plan: The compiled plan, whose own taps are the priors.
        stats: The statistics that it was compiled from, at its noise levels.
        depth: Most earlier computed steps that a row may read.
        truth: The uncached run.
    """

    def __init__(self, plan: Plan, stats: CalibrationStats, depth: int, truth: Truth) -> None:
        self.unit = plan.step_row
        plain = self.unit.model_copy(update={"taps": None})
        super().__init__(plain.schedule(plan.sigmas), plan.sigmas, affine, Tensor.clone)
        self.depth, self.truth = depth, truth
        self.taps: list[tuple[float, ...]] = [()] * plan.num_steps
        self.sample: Tensor | None = None
        self._past: list[tuple[int, Tensor]] = []
        self._segments, self._loads = stats.segments, stats.loads[:, -1]
        # Before this step nothing has gone wrong that the plan could pay back.
        schedules = plan.schedules.values() if moves_as_euler(stats) else [self.schedule]
        self._first = min(
            (schedule.cached.index(True) for schedule in schedules if any(schedule.cached)),
            default=plan.num_steps,
        )

    def compute(self, step: int, velocity: Tensor) -> Tensor | None:
        """The mean velocity of a computed step, fitted."""
        stop = self.after(step)
        earlier = [
            value
            for source, value in reversed(self._past)
            if self._segments[source] == self._segments[step]
        ][: self.depth]
        mean = velocity
        if stop > self._first and self._loads[step] and earlier:
            mean = self._fit(step, stop, velocity, earlier)
        self._past = [*self._past, (step, velocity.clone())][-self.depth :]
        super().compute(step, mean)
        return mean

    def row(self) -> UnitPlan:
        """The step unit as fitted."""
        return self.unit.model_copy(update={"taps": tuple(self.taps)})

    def _fit(self, step: int, stop: int, velocity: Tensor, earlier: Sequence[Tensor]) -> Tensor:
        assert self.sample is not None
        length = self.truth.length(step, stop)
        wanted = (self.truth.latents[stop] - flat(self.sample)) / length - flat(velocity)
        prior = np.zeros(len(earlier))
        compiled = () if self.unit.taps is None else self.unit.taps[step][: len(prior)]
        prior[: len(compiled)] = compiled
        basis = np.stack([flat(velocity - other) for other in earlier], axis=1)
        found = np.round(fit_row(basis, wanted, prior), DECIMALS).tolist()
        self.taps[step] = tuple(found)
        return affine(velocity, earlier, found)


def _run_closed(pipe: Any, batch: Batch, plan: Plan, loop: ClosedLoop) -> None:
    """Generate under the plan with the loop in the place of its step executor."""
    row = loop.unit.model_copy(update={"taps": None})

    def on_step(index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        loop.sample = sample
        return velocity

    with apply_plan(pipe, _with_step(plan, row)) as run:
        run.main.units.step.executor = loop
        with tapped_step(pipe.scheduler, on_step):
            run_pipeline(pipe, batch.arguments)


def _uncached(pipe: Any, batch: Batch, plan: Plan) -> tuple[Truth, Tensor]:
    """The uncached run, and its images."""
    latents: dict[int, Array] = {}
    lengths: list[float] = []

    def on_step(index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        steps = len(pipe.scheduler.sigmas) - 1
        if steps != plan.num_steps:
            raise ModelMismatchError(
                f"the pipeline takes {steps} steps and the plan has {plan.num_steps}: leave "
                "sigmas and timesteps out of call_kwargs, or compile the plan for them"
            )
        latents[index] = flat(sample)
        lengths[:] = np.diff(pipe.scheduler.sigmas.tolist())
        return velocity

    def on_move(used: Tensor, sample: Tensor, result: Any) -> None:
        latents[plan.num_steps] = flat(moved_sample(result))

    with tapped_step(pipe.scheduler, on_step, on_move):
        images = run_pipeline(pipe, batch.arguments)
    return Truth(latents, np.array(lengths)), images


def _psnr(pipe: Any, batch: Batch, plan: Plan, reference: Tensor) -> float:
    """Mean PSNR in dB to the uncached images; of latents, where nothing decodes them."""
    with apply_plan(pipe, plan):
        images = run_pipeline(pipe, batch.arguments)
    measure = psnr if decodes(pipe) else latent_psnr
    return float(measure(images, reference).mean())


def _with_step(plan: Plan, row: UnitPlan) -> Plan:
    """The plan with another row of the step unit; what it states of itself is as before."""
    return plan.model_copy(update={"units": (row, *plan.groups)})


def _restated(stats: CalibrationStats, here: CalibrationStats, plan: Plan) -> Plan:
    """A plan of new taps with its figures computed anew and verified; `here` is at its sigmas."""
    budget = plan.budget
    if budget.psnr_db is not None:
        # What is fitted on runs is better there, and not in what was foretold: its share is kept.
        budget = Budget(fraction=min(plan.predicted.compute_share, 1.0))
    recomputed = recompute(stats, plan.model_copy(update={"budget": budget}))
    psnr = predicted_psnr(here, recomputed.error)
    found = Plan.of(
        here,
        budget,
        plan.asked,
        plan.units,
        psnr=psnr if np.isfinite(psnr).all() else None,
        certificate=plan.certificate.model_copy(update={"value": recomputed.objective}),
        provenance=plan.provenance,
    )
    verify(stats, found)
    return found


def flat(tensor: Tensor) -> Array:
    """(P, N) in double precision, on the CPU."""
    result: Array = tensor.flatten(1).double().cpu().numpy()
    return result
