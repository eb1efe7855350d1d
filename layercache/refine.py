"""`refine_plan`: the multistep coefficients of a plan, fitted again on the accelerated run itself.

Compiling foretells errors around the uncached run. The accelerated run drifts away from it, and at
few computed steps what is foretold is no longer what happens. Here the calibration prompts are
generated once in full, and once under the plan, all prompts in one pipeline call. At every computed
step a, just before its velocity is used, the mean velocity until the next computed step e

    v_a + sum_h b_h (v_a - v_{a_h}),      a_h the h-th computed step before a,

is fitted to where the uncached run is at e (`solver.rows.fit_row`): target (z_e - x_a) / (sigma_e -
sigma_a), prior the compiled coefficients. The run goes on from what the fit gives, so that errors
made before are seen, and paid back, by later fits. Which steps are computed stays as it was.

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
from layercache.errors import LayerCacheError, ModelMismatchError, StatsError
from layercache.figures import held_bytes, restate
from layercache.models.pipelines import run_pipeline
from layercache.models.stepping import tapped_step
from layercache.plan import REFRESH, Plan, UnitPlan
from layercache.runtime import apply_plan
from layercache.runtime.arithmetic import mean_velocity
from layercache.solver.multistep import DECIMALS, DEPTH
from layercache.solver.rows import fit_row
from layercache.stats import CalibrationStats
from layercache.taps import as_multistep

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
    """The plan with coefficients fitted in closed loop; the plan itself where that does no good.

    Args:
        pipe: The pipeline that the plan is for.
        plan: A compiled plan with a step unit that predicts.
        stats: The statistics that it was compiled from.
        prompts: At least two strings that one pipeline call can take together; those of the
            calibration do.
        seed: With the prompt, it seeds the starting noise; see `calibrate`.
        call_kwargs: More pipeline arguments, as served.
        log: Receives a line on what was measured.

    Returns:
        A plan of the same schedule. `provenance["refined"]` tells the prompts, and mean PSNR in dB
        on them before and after.

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
    history = int(plan.provenance.get("history", 1))
    unit = plan.step_unit
    fitted = plan.certificate.gains in ("multistep", "trajectory", "cell")
    if unit is None or not fitted or history < 1 or set(unit.cells) == {REFRESH}:
        raise LayerCacheError(
            "this plan has nothing to refine: it needs a step unit that skips steps and a history "
            'of at least 1; compile it with units=("step", ...) and gains="multistep"'
        )
    arguments = {**(call_kwargs or {}), "num_inference_steps": plan.num_steps}
    work = batches(prompts, seed, len(prompts), arguments)
    if len(prompts) < 2 or len(work) > 1:
        raise StatsError(
            f"{len(prompts)} prompts make {len(work)} pipeline calls; refining needs two prompts "
            "or more, as strings, that fit into one call"
        )
    (batch,) = work
    began = time.perf_counter()
    with torch.no_grad():
        truth, reference = _uncached(pipe, batch, plan)
        before = after = _psnr(pipe, batch, plan, reference)
        refined = plan
        for depth in range(DEPTH, 0, -1):
            loop = _ClosedLoop(plan, unit, depth, truth)
            with tapped_step(pipe.scheduler, loop.on_step), apply_plan(pipe, _plain(plan)):
                run_pipeline(pipe, batch.arguments)
            units = _with_step(plan, loop.row())
            # Deeper bases live longer; where bytes are limited, shallower ones have to do.
            if _fits(stats, plan, units):
                refined = restate(stats, as_multistep(plan), units)
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


@dataclass(frozen=True)
class _Stretch:
    """A computed step, and the skipped ones until the next."""

    number: int
    start: int
    stop: int


def _stretches(unit: UnitPlan) -> list[_Stretch]:
    starts = [step for step, symbol in enumerate(unit.cells) if symbol == REFRESH]
    stops = [*starts[1:], len(unit.cells)]
    return [_Stretch(i, *ends) for i, ends in enumerate(zip(starts, stops, strict=True))]


class _ClosedLoop:
    """Fits every stretch as the run reaches it.

    Args:
        plan: The compiled plan, whose own coefficients are the priors.
        unit: Its step unit.
        depth: Most computed steps before the anchor that a fit may use.
        truth: For each step the latents (P, N) that the uncached run has before it, and at the end.
    """

    def __init__(self, plan: Plan, unit: UnitPlan, depth: int, truth: Mapping[int, Array]) -> None:
        self.unit, self.depth, self.truth = unit, depth, truth
        self.schedule = plan.schedules[unit.name]
        self.sigmas = np.array(plan.sigmas)
        self.stretches = {stretch.start: stretch for stretch in _stretches(unit)}
        self.computed = list(self.stretches)
        self.first_skipped = self.schedule.cached.index(True)
        self.velocities: list[Tensor] = []
        self.mean: Tensor | None = None
        self.taps: list[tuple[float, ...]] = [()] * len(unit.cells)

    def on_step(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """What the scheduler gets: at a computed step the fit, then the same until the next."""
        stretch = self.stretches.get(index)
        if stretch is not None:
            self.velocities.append(velocity.clone())
            # Only as many are kept as may be read.
            self.velocities[: -1 - self.depth] = []
            # Before the first skipped step nothing has gone wrong; at the first stretch there is no
            # earlier velocity.
            exact = stretch.stop <= self.first_skipped or stretch.number == 0
            self.mean = velocity if exact else self._fit(stretch, sample)
        assert self.mean is not None
        return self.mean

    def row(self) -> UnitPlan:
        """The step unit as fitted."""
        return self.unit.model_copy(update={"gains": None, "taps": tuple(self.taps)})

    def _fit(self, stretch: _Stretch, sample: Tensor) -> Tensor:
        count = min(self.depth, stretch.number)
        velocity, earlier = self.velocities[-1], self.velocities[-1 - count : -1][::-1]
        length = float(self.sigmas[stretch.stop] - self.sigmas[stretch.start])
        wanted = (self.truth[stretch.stop] - _flat(sample)) / length - _flat(velocity)
        prior = np.array([self._prior(stretch, back, length) for back in range(1, count + 1)])
        basis = np.stack([_flat(velocity - other) for other in earlier], axis=1)
        found = np.round(fit_row(basis, wanted, prior), DECIMALS).tolist()
        self.taps[stretch.start] = tuple(found)
        return mean_velocity(velocity, earlier, found)

    def _prior(self, stretch: _Stretch, back: int, length: float) -> float:
        """What the compiled plan's own taps or cells come to."""
        source, schedule = self.computed[stretch.number - back], self.schedule
        if schedule.taps is not None:
            return dict(schedule.taps[stretch.start]).get(source, 0.0)
        moved = (
            (self.sigmas[step + 1] - self.sigmas[step]) * schedule.weight[step]
            for step in range(stretch.start, stretch.stop)
            if schedule.base[step] == source
        )
        return float(sum(moved)) / length


def _uncached(pipe: Any, batch: Batch, plan: Plan) -> tuple[dict[int, Array], Tensor]:
    """Images of the uncached run, and its latents at each step that the plan computes and last."""
    states: dict[int, Array] = {}
    last, lengths = plan.num_steps - 1, np.diff(plan.sigmas)
    run = plan.run_steps

    def on_step(index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        steps = len(pipe.scheduler.sigmas) - 1
        if steps != plan.num_steps:
            raise ModelMismatchError(
                f"the pipeline takes {steps} steps and the plan has {plan.num_steps}: leave "
                "sigmas and timesteps out of call_kwargs, or compile the plan for them"
            )
        if run[index]:
            states[index] = _flat(sample)
        if index == last:
            states[index + 1] = _flat(sample) + float(lengths[-1]) * _flat(velocity)
        return velocity

    with tapped_step(pipe.scheduler, on_step):
        images = run_pipeline(pipe, batch.arguments)
    return states, images


def _psnr(pipe: Any, batch: Batch, plan: Plan, reference: Tensor) -> float:
    """Mean PSNR in dB of the plan's images to the uncached ones, both clamped to [0, 1]."""
    with apply_plan(pipe, plan):
        images = run_pipeline(pipe, batch.arguments)
    squared = (images.clamp(0, 1) - reference.clamp(0, 1)).flatten(1).double().pow(2).mean(dim=1)
    return float((-10 * torch.log10(squared.clamp_min(1e-20))).mean())


def _plain(plan: Plan) -> Plan:
    """The same schedule, every skipped step plain reuse: what computed steps give is untouched."""
    unit = plan.step_unit
    assert unit is not None
    row = unit.model_copy(update={"gains": None, "taps": ((),) * len(unit.cells)})
    return plan.model_copy(update={"units": _with_step(plan, row), "schema_version": 2})


def _with_step(plan: Plan, row: UnitPlan) -> tuple[UnitPlan, ...]:
    return tuple(row if unit.kind == "step" else unit for unit in plan.units)


def _fits(stats: CalibrationStats, plan: Plan, units: tuple[UnitPlan, ...]) -> bool:
    limit = plan.provenance.get("max_cache_bytes")
    return limit is None or held_bytes(stats, plan.model_copy(update={"units": units})) <= limit


def _flat(tensor: Tensor) -> Array:
    result: Array = tensor.flatten(1).double().cpu().numpy()
    return result
