"""`verify`: every figure of a plan again, from the plan as it will be read and the statistics.

It shares no code with the solvers, the prediction or the plan's own resolving of rows, and is
written for plainness instead of speed: every vector is formed, every rule is one check. It reads
`cells`, `taps`, `budget` and `asked`, and recomputes

- the rules: what may be cached, anchors and gaps, forced steps, segments, what was measured;
- the milliseconds, and whether they are within the budget; speedup and share;
- the quality that was asked for, where the budget is one;
- the peak of bytes held between steps, for one image;
- the sum of prices, where the certificate is of that;
- the error of every prompt, by the recursion of the error model (`_verify_error`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from layercache._verify_error import Row, foretold, growths
from layercache.errors import LayerCacheError
from layercache.plan import Budget, Plan
from layercache.stats import CalibrationStats, FloatArray
from layercache.stats.resample import resample

_AGREEMENT = 1e-6
_COST_RTOL = 1e-9


class VerificationError(LayerCacheError):
    """A plan does not hold what it says: a bug in LayerCache, or the statistics are not its own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Verification:
    """What was recomputed of a plan.

    Attributes:
        cost_ms: Milliseconds of the transformer.
        speedup: Of the whole generation.
        compute_share: Of full compute.
        cache_bytes: Peak of bytes held between steps.
        error: (P,) mean squared error per element of the final latent, foretold.
        objective: What the certificate is of: the sum of prices, or the score.
    """

    cost_ms: float
    speedup: float
    compute_share: float
    cache_bytes: int
    error: FloatArray
    objective: float


def verify(stats: CalibrationStats, plan: Plan) -> Verification:
    """Recompute a plan's figures, check its rules, and compare.

    Args:
        stats: The statistics that the plan was compiled from.
        plan: A finished plan.

    Raises:
        VerificationError: A rule is broken or a figure is wrong; the message lists all of them.
        StatsError: The statistics cannot be interpolated to the plan's sigmas.
    """
    found = recompute(stats, plan)
    wrong = _disagreements(stats, plan, found)
    if wrong:
        raise _refused(wrong)
    return found


def _lost(budget: Budget, psnr: FloatArray) -> list[str]:
    """What of (P,) PSNR is below the quality that was asked for."""
    if budget.psnr_db is None or budget.quantile is None:
        return []
    # Infinite decibels have no differences.
    found = np.quantile(np.minimum(psnr, 1000.0), budget.quantile)
    if found >= budget.psnr_db * (1 - _AGREEMENT):
        return []
    return [f"it keeps {found:.6f} dB at the quantile {budget.quantile}, not {budget.psnr_db}"]


def recompute(stats: CalibrationStats, plan: Plan) -> Verification:
    """A plan's figures from its rows; what it states of itself is not looked at.

    Raises:
        VerificationError: A rule is broken; the message lists all of them.
    """
    if plan.asked.sigmas is not None:
        stats = resample(stats, np.array(plan.asked.sigmas))
    if tuple(plan.sigmas) != tuple(float(sigma) for sigma in stats.sigmas):
        raise VerificationError(
            f"the plan has {len(plan.sigmas)} sigmas from {plan.sigmas[0]}, and the statistics "
            f"{len(stats.sigmas)} from {stats.sigmas[0]}: they are not of one schedule"
        )
    rows = [Row(stats, unit) for unit in (plan.step_row, *plan.groups)]
    cost, held = _cost(stats, rows), _peak_bytes(stats, rows)
    wrong = _broken(stats, plan, rows) + _overspent(stats, plan, cost, held)
    if wrong:
        raise _refused(wrong)
    full, outside = _full_cost(stats), sum(_passes(stats)) * stats.overhead_ms
    error = np.array([foretold(stats, rows, p) for p in range(stats.num_prompts)])
    return Verification(
        cost_ms=cost,
        speedup=(full + outside) / (cost + outside),
        compute_share=cost / full,
        cache_bytes=held,
        error=error,
        objective=_objective(stats, plan, rows, error),
    )


def _refused(wrong: Sequence[str]) -> VerificationError:
    return VerificationError(
        f"the plan does not hold what it says: {'; '.join(wrong)}. This is a bug if the statistics "
        "are those that it was compiled from: please report it with the statistics file"
    )


def _broken(stats: CalibrationStats, plan: Plan, rows: Sequence[Row]) -> list[str]:
    broken = []
    asked, runs = plan.asked, rows[0].computed
    for row in rows:
        for step in range(stats.num_steps):
            at = f"{row.name} at step {step}"
            reads = [*row.reads[step]]
            if row.cached[step]:
                anchor = row.anchor[step]
                assert anchor is not None
                reads.append(anchor)
                if step in asked.forced:
                    broken.append(f"{at} is cached, though forced")
                if asked.max_gap is not None and step - anchor > asked.max_gap:
                    broken.append(
                        f"{at} is {step - anchor} from its anchor; {asked.max_gap} may be"
                    )
                if ("step" if row.group is None else "groups") not in asked.units:
                    broken.append(f"{at} is cached; units are {asked.units}")
            if row.group is not None and not row.cached[step] and row.computed[step] != runs[step]:
                broken.append(f"{at} is not computed, idle and cached at once")
            for source in reads:
                if not row.computed[source] or source >= step:
                    broken.append(f"{at} reads step {source}, which is not computed before it")
                if stats.segments[source] != stats.segments[step]:
                    broken.append(f"{at} reads step {source}, of another segment")
                if row.group is not None and step - source > stats.max_lag:
                    broken.append(f"{at} reads {step - source} back; {stats.max_lag} were measured")
    return broken


def _overspent(stats: CalibrationStats, plan: Plan, cost: float, held: int) -> list[str]:
    limit, most, found = plan.budget.limit_ms(stats), plan.asked.max_cache_bytes, []
    if cost > limit + _COST_RTOL * abs(limit):
        found.append(f"it costs {cost:.6f} ms, more than the budget of {limit:.6f} ms")
    if most is not None and held > most:
        found.append(f"it holds {held} bytes, more than max_cache_bytes={most}")
    return found


def _cost(stats: CalibrationStats, rows: Sequence[Row]) -> float:
    """Milliseconds of the transformer: the rest of every step that runs, and computed groups."""
    by_group = {row.group: row.computed for row in rows[1:]}
    runs, cost = rows[0].computed, 0.0
    for step in range(stats.num_steps):
        if runs[step]:
            cost += stats.rest_ms * float(stats.loads[step, -1])
            for group, milliseconds in enumerate(stats.group_ms):
                # Blocks of groups without a row are computed wherever the transformer runs.
                if by_group.get(group, runs)[step]:
                    cost += float(milliseconds) * float(stats.loads[step, group])
    return cost


def _passes(stats: CalibrationStats) -> list[int]:
    """How often the uncached run makes the calls of each step."""
    return [stats.passes] * (stats.num_steps - 1) + [1]


def _full_cost(stats: CalibrationStats) -> float:
    """Milliseconds of the transformer in the uncached run."""
    times, cost = [*stats.group_ms, stats.rest_ms], 0.0
    for step, passes in enumerate(_passes(stats)):
        for unit, milliseconds in enumerate(times):
            cost += passes * float(milliseconds) * float(stats.loads[step, unit])
    return cost


def _peak_bytes(stats: CalibrationStats, rows: Sequence[Row]) -> int:
    """Peak over steps of what is stored: each value from its step to its last reader."""
    steps = stats.num_steps
    held = [0] * steps
    for row in rows:
        size = stats.velocity_bytes if row.group is None else stats.group_bytes[row.group]
        for source in range(steps):
            readers = [t for t in range(steps) if source in row.reads[t]]
            if row.group is not None:
                readers += [t for t in range(steps) if row.anchor[t] == source]
            for now in range(source, max(readers, default=source - 1) + 1):
                held[now] += size
        if row.group is None:
            for now in range(steps):
                if row.cached[now] or (now + 1 < steps and row.cached[now + 1]):
                    held[now] += stats.velocity_bytes + stats.output_bytes
    return max(held)


def _objective(
    stats: CalibrationStats, plan: Plan, rows: Sequence[Row], error: FloatArray
) -> float:
    """The score, or the sum of prices: each cell reuses or predicts, whichever is cheaper."""
    if plan.certificate.objective == "score":
        if error.max() <= 0:
            return -math.inf
        return float(np.log10(np.maximum(error, 1e-12 * error.max())).mean())
    cached = [(row, step) for row in rows for step, here in enumerate(row.cached) if here]
    return sum((_price(stats, plan, row, step) for row, step in cached), 0.0)


def _price(stats: CalibrationStats, plan: Plan, row: Row, step: int) -> float:
    before = [source for source in range(step) if row.computed[source]]
    anchor = before[-1]
    sigma, prompts = stats.sigmas.astype(np.float64), range(stats.num_prompts)

    def delta(prompt: int, source: int) -> FloatArray:
        if row.group is None:
            velocity = stats.velocities[prompt].astype(np.float64)
            moved: FloatArray = velocity[source] - velocity[step]
            return moved
        measured: FloatArray = stats.deltas[prompt, step, row.group, step - source - 1]
        return measured.astype(np.float64)

    reuse = [delta(p, anchor) for p in prompts]
    found = [sum(float(x @ x) for x in reuse)]
    longest = 2 * 12 if row.group is None else stats.max_lag
    usable = len(before) > 1 and step - before[-2] <= longest and plan.asked.predictor != "reuse"
    if usable and (row.group is not None or anchor - before[-2] <= 12):
        base = before[-2]
        rise = (sigma[step] - sigma[anchor]) / (sigma[anchor] - sigma[base])
        moves = [rise * (x - delta(p, base)) for p, x in zip(prompts, reuse, strict=True)]
        norm = sum(float(y @ y) for y in moves)
        gain = 1.0
        if plan.asked.predictor == "fitted" and norm > 0:
            inner = sum(float(x @ y) for x, y in zip(reuse, moves, strict=True))
            # Least squares with 2 % of the norm as a pull towards 1, within -1 and 4.
            gain = min(max((0.02 - inner / norm) / 1.02, -1.0), 4.0)
        predicted = [x + gain * y for x, y in zip(reuse, moves, strict=True)]
        found.append(sum(float(x @ x) for x in predicted))
    move = (sigma[step + 1] - sigma[step]) * growths(stats)[step]
    return float(move**2 * min(found) / stats.num_prompts / stats.numel)


def _disagreements(stats: CalibrationStats, plan: Plan, found: Verification) -> list[str]:
    predicted, certificate = plan.predicted, plan.certificate
    checks: list[tuple[str, float | None, float, float]] = [
        ("speedup", predicted.speedup, found.speedup, 0.0),
        ("compute_share", predicted.compute_share, found.compute_share, 0.0),
        ("cache_bytes", predicted.cache_bytes, found.cache_bytes, 0.0),
    ]
    with np.errstate(divide="ignore"):
        psnr = -10 * np.log10(stats.image_gain * found.error)
    # Where next to nothing is left of vectors that cancel, decibels are rounding.
    slack = 0.0 if psnr.max() < 150 else math.inf
    if predicted.psnr_db is not None:
        checks += [
            ("psnr_db", predicted.psnr_db, float(psnr.mean()), slack),
            ("psnr_median_db", predicted.psnr_median_db, float(np.median(psnr)), slack),
            ("psnr_worst_db", predicted.psnr_worst_db, float(psnr.min()), slack),
        ]
    if np.isfinite(found.objective):
        rounding = slack if certificate.objective == "score" else 0.0
        checks.append(("certificate.value", certificate.value, found.objective, rounding))
    wrong = [
        f"it states {name} = {stated!r}, but the statistics give {recomputed!r}"
        for name, stated, recomputed, slack in checks
        if stated is not None
        and not abs(stated - recomputed) <= _AGREEMENT * max(abs(stated), 1e-12) + slack
    ]
    wrong += _lost(plan.budget, psnr)
    bound = certificate.lower_bound
    if bound is not None and bound > certificate.value * (1 + _AGREEMENT):
        wrong.append(f"its lower bound {bound!r} is above its value {certificate.value!r}")
    return wrong
