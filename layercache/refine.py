"""`refine_plan`: the gains of a compiled plan, fitted again on the accelerated run itself.

Compiling foretells errors around the uncached run. The accelerated run drifts away from it, and at
few computed steps what is foretold is no longer what happens. Here the calibration prompts are
generated once in full, and once under the plan, all prompts in one pipeline call. At every computed
step a, just before its velocity is used, the mean velocity until the next computed step e

    v_a + sum_h b_h (v_a - v_{a_h}),      a_h the h-th computed step before a,

is fitted to where the uncached run is at e (`solver.rows.fit_row`): target (z_e - x_a) / (sigma_e -
sigma_a). The run goes on from what the fit gives, so that errors made before are seen, and paid
back, by later fits. Which steps are computed stays as it was. The coefficients are then written
into the plan's own cells: b_1 into the correction of step a, every deeper one into the gain of a
skipped step. There are at most as many coefficients as the plan has history, or as the stretch has
cells.

Cost: 1 generation in full and 3 under the plan, of all prompts; one more under the plan for each
level of history that a memory limit forbids. The plan's figures are computed
again from the statistics and verified; whether refining helped is measured on the same prompts, and
if it did not, the compiled plan comes back.

Source: the closed loop is that of fitting a non-stationary solver (Shaul et al., arXiv 2403.01329)
row by row; here the rows are a plan's cells.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layercache.calibration.profile import run_pipeline
from layercache.calibration.prompts import Batch, Prompt, batches
from layercache.errors import LayerCacheError, ModelMismatchError, StatsError
from layercache.figures import restate
from layercache.models.stepping import tapped_step
from layercache.plan import MAX_SPAN, REFRESH, SPANS, Plan, UnitPlan
from layercache.runtime import apply_plan
from layercache.solver.rows import fit_row
from layercache.stats import CalibrationStats

Array = NDArray[np.float64]
_DECIMALS = 6


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
    """The plan with gains fitted in closed loop; the plan itself where that does no good.

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
    if unit is None or history < 1 or set(unit.cells) == {REFRESH}:
        raise LayerCacheError(
            "this plan has nothing to refine: it needs a step unit that skips steps and a history "
            'of at least 1; compile it with units=("step", ...) and gains="trajectory"'
        )
    arguments = {**(call_kwargs or {}), "num_inference_steps": plan.num_steps}
    work = batches(prompts, seed, len(prompts), arguments)
    if len(prompts) < 2 or len(work) > 1:
        raise StatsError(
            f"{len(prompts)} prompts make {len(work)} pipeline calls; refining needs two prompts "
            "or more, as strings, that fit into one call"
        )
    (batch,) = work
    with torch.no_grad():
        truth, reference = _uncached(pipe, batch, plan)
        before = after = _psnr(pipe, batch, plan, reference)
        refined = plan
        for depth in range(history, 0, -1):
            loop = _ClosedLoop(plan, unit, depth, truth)
            with tapped_step(pipe.scheduler, loop.on_step), apply_plan(pipe, _plain(plan)):
                run_pipeline(pipe, batch)
            units = _with_step(plan, loop.row())
            # Deeper bases live longer; where bytes are limited, shallower ones have to do.
            if _fits(stats, plan, units):
                refined = restate(stats, plan, units)
                after = _psnr(pipe, batch, refined, reference)
                break
    better = after > before
    log(
        f"refined on {len(prompts)} prompts: {before:.2f} dB before, {after:.2f} dB after"
        + ("" if better else "; the compiled plan is kept")
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
        plan: The compiled plan, whose own gains are the priors.
        unit: Its step unit.
        history: Most computed steps before the anchor that may be bases.
        truth: For each step the latents (P, N) that the uncached run has before it, and at the end.
    """

    def __init__(
        self, plan: Plan, unit: UnitPlan, history: int, truth: Mapping[int, Array]
    ) -> None:
        self.unit, self.history, self.truth = unit, history, truth
        self.schedule = plan.schedules[unit.name]
        self.sigmas = np.array(plan.sigmas)
        self.stretches = {stretch.start: stretch for stretch in _stretches(unit)}
        self.computed = list(self.stretches)
        self.first_skipped = self.schedule.cached.index(True)
        self.velocities: list[Tensor] = []
        self.mean: Tensor | None = None
        self.cells = list(unit.cells)
        self.gains = [0.0] * len(unit.cells)

    def on_step(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """What the scheduler gets: at a computed step the fit, then the same until the next."""
        stretch = self.stretches.get(index)
        if stretch is not None:
            self.velocities.append(velocity.clone())
            # Only as many are kept as may be read.
            self.velocities[: -1 - self.history] = []
            self.mean = velocity if self._exact(stretch) else self._fit(stretch, sample)
        assert self.mean is not None
        return self.mean

    def row(self) -> UnitPlan:
        """The step unit as fitted."""
        gains = tuple(round(gain, _DECIMALS) for gain in self.gains)
        return self.unit.model_copy(update={"cells": "".join(self.cells), "gains": gains})

    def _exact(self, stretch: _Stretch) -> bool:
        # Before the first skipped step nothing has gone wrong; at the first stretch there is no
        # earlier velocity.
        early = stretch.stop <= self.first_skipped or stretch.number == 0
        if early:
            for step in range(stretch.start + 1, stretch.stop):
                self.cells[step] = SPANS[0]
        return early

    def _fit(self, stretch: _Stretch, sample: Tensor) -> Tensor:
        bases = self._bases(stretch)
        velocity = self.velocities[-1]
        moves = [velocity - self.velocities[-1 - depth] for depth in bases]
        length = float(self.sigmas[stretch.stop] - self.sigmas[stretch.start])
        wanted = (self.truth[stretch.stop] - _flat(sample)) / length - _flat(velocity)
        prior = np.array([self._prior(stretch, depth, length) for depth in bases])
        basis = np.stack([_flat(move) for move in moves], axis=1)
        found = fit_row(basis, wanted, prior)
        self._write(stretch, dict(zip(bases, found.tolist(), strict=True)), length)
        mean = velocity.double()
        for coefficient, move in zip(found.tolist(), moves, strict=True):
            mean = mean + coefficient * move.double()
        return mean.to(velocity.dtype)

    def _bases(self, stretch: _Stretch) -> list[int]:
        """Depths of base that there are cells for: 1 for the correction, then skipped steps."""
        room = min(self.history, stretch.number, stretch.stop - stretch.start)
        return [1, *(depth for depth in range(2, room + 1) if self._span(stretch, depth))]

    def _span(self, stretch: _Stretch, depth: int) -> int:
        """Steps from the anchor back to a base, 0 if that has no symbol in a plan."""
        span = stretch.start - self.computed[stretch.number - depth]
        return span if span <= MAX_SPAN else 0

    def _prior(self, stretch: _Stretch, depth: int, length: float) -> float:
        """What the compiled plan's own cells come to."""
        base = self.computed[stretch.number - depth]
        return (
            sum(
                self._dsigma(step) * self.schedule.weight[step]
                for step in range(stretch.start, stretch.stop)
                if self.schedule.base[step] == base
            )
            / length
        )

    def _dsigma(self, step: int) -> float:
        return float(self.sigmas[step + 1] - self.sigmas[step])

    def _write(self, stretch: _Stretch, coefficients: Mapping[int, float], length: float) -> None:
        """Spread mean-velocity coefficients over the stretch's cells.

        Each depth above 1 gets one skipped step, the first ones; the rest, and the computed step's
        correction, share depth 1.
        """
        skipped = list(range(stretch.start + 1, stretch.stop))
        deep = [depth for depth in coefficients if depth > 1]
        owners = {1: [stretch.start]}
        for step in skipped:
            depth = deep.pop(0) if deep else 1
            span = self._span(stretch, depth)
            self.cells[step] = SPANS[span]
            if span:
                owners.setdefault(depth, []).append(step)
        for depth, steps in owners.items():
            weight = coefficients[depth] * length / sum(self._dsigma(step) for step in steps)
            base = self.computed[stretch.number - depth]
            slope = self.sigmas[stretch.start] - self.sigmas[base]
            for step in steps:
                rise = (self.sigmas[step] - self.sigmas[stretch.start]) / slope
                self.gains[step] = weight if step == stretch.start else float(weight / rise)


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
        images = run_pipeline(pipe, batch)
    return states, images


def _psnr(pipe: Any, batch: Batch, plan: Plan, reference: Tensor) -> float:
    """Mean PSNR in dB of the plan's images to the uncached ones, both clamped to [0, 1]."""
    with apply_plan(pipe, plan):
        images = run_pipeline(pipe, batch)
    squared = (images.clamp(0, 1) - reference.clamp(0, 1)).flatten(1).double().pow(2).mean(dim=1)
    return float((-10 * torch.log10(squared.clamp_min(1e-20))).mean())


def _plain(plan: Plan) -> Plan:
    """The same schedule, every skipped step plain reuse: what computed steps give is untouched."""
    unit = plan.step_unit
    assert unit is not None
    cells = "".join(symbol if symbol == REFRESH else SPANS[0] for symbol in unit.cells)
    return plan.model_copy(
        update={
            "units": _with_step(
                plan, unit.model_copy(update={"cells": cells, "gains": (0.0,) * len(cells)})
            )
        }
    )


def _with_step(plan: Plan, row: UnitPlan) -> tuple[UnitPlan, ...]:
    return tuple(row if unit.kind == "step" else unit for unit in plan.units)


def _fits(stats: CalibrationStats, plan: Plan, units: tuple[UnitPlan, ...]) -> bool:
    limit = plan.provenance.get("max_cache_bytes")
    sizes = {group.name: size for group, size in zip(stats.groups, stats.group_bytes, strict=True)}
    changed = plan.model_copy(update={"units": units})
    held = changed.cache_bytes(sizes, stats.velocity_bytes, stats.output_bytes)
    return limit is None or held <= limit


def _flat(tensor: Tensor) -> Array:
    result: Array = tensor.flatten(1).double().cpu().numpy()
    return result
