"""`verify`: every number of a plan again, from the statistics alone.

This file shares no code with the solvers, the pricing or the plan format, and is written for
plainness instead of speed: every delta is formed as a vector, every rule is one check. It reads
rows of resolved cells and recomputes

- the rules: step 0 refreshed; groups idle at just the skipped steps; taps at refreshed steps, of
  refreshes within reach; the anchor is the unit's last
  refresh, the base one of the `history` refreshes before it; lags within what was measured and
  within `max_gap`; forced steps refreshed; gains only where there is something to multiply;
- the cost in milliseconds against the budget;
- the certificate's objective, with each cell's gain as the pricing rule has it;
- the final error of every prompt with the gains that the rows carry;
- the peak of bytes held between steps, for one image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from layercache.errors import LayerCacheError
from layercache.stats import CalibrationStats, FloatArray

_COST_RTOL = 1e-9
_ROUNDING = 1e-12
"""Of the sum of what is added up, before anything cancels."""


class VerificationError(LayerCacheError):
    """A compiled plan does not hold what it says: a bug in LayerCache."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One unit of a plan, one entry a step.

    `group` is the position in `stats.groups`, or None for the step unit. `anchor` and `base` are -1
    where there is none; a refreshed step of the step unit with a correction has a base and no
    anchor. `weight` is w in r_a + w (r_a - r_b), or in v + w (v - v_base) at a refreshed step.

    `taps` are the multistep coefficients of a step unit, as pairs (source, b) at each refreshed
    step; they are what is run, and the bases are then only what the objective is of.
    """

    group: int | None
    refresh: Sequence[bool]
    anchor: Sequence[int]
    base: Sequence[int]
    weight: Sequence[float]
    taps: Sequence[Sequence[tuple[int, float]]] | None = None


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a plan was asked to keep to. `depth` is how many refreshes back taps may reach."""

    budget_ms: float
    history: int
    gains: str
    power: float = 1.0
    max_gap: int | None = None
    forced: frozenset[int] = frozenset()
    max_cache_bytes: int | None = None
    depth: int = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Verification:
    """What was recomputed, and every rule that is broken (none if the plan is sound).

    Attributes:
        broken: The broken rules, in words.
        cost_ms: Milliseconds of the transformer.
        objective: Sum of the prices of all cached cells.
        objective_rounding: What double precision may move the objective by: a prediction that is
            almost perfect is a small difference of large numbers.
        cache_bytes: Peak of bytes held between steps.
        error: (P,) predicted mean squared error of the final latent.
        error_rounding: (P,) what double precision may move it by.
    """

    broken: tuple[str, ...]
    cost_ms: float
    objective: float
    objective_rounding: float
    cache_bytes: int
    error: FloatArray
    error_rounding: FloatArray

    def require(self) -> Verification:
        """Itself, if no rule is broken.

        Raises:
            VerificationError: A rule is broken; the message lists all of them.
        """
        if self.broken:
            raise VerificationError(
                "the plan breaks its own rules: "
                + "; ".join(self.broken)
                + ". This is a bug: please report it with the statistics file"
            )
        return self


def verify(stats: CalibrationStats, rows: Sequence[Row], rules: Rules) -> Verification:
    """Recompute a plan's figures and check its rules.

    Cost and cache bytes are recomputed for any rows. The objective and the errors are NaN if a
    broken rule leaves them without meaning.

    Args:
        stats: The statistics that the plan was compiled from.
        rows: One row a unit.
        rules: What the plan must keep to.
    """
    broken = _broken_rules(stats, rows, rules)
    cost = _cost(stats, rows)
    if cost > rules.budget_ms + _COST_RTOL * abs(rules.budget_ms):
        broken.append(f"it costs {cost:.6f} ms, more than the budget of {rules.budget_ms:.6f} ms")
    held = _peak_bytes(stats, rows)
    if rules.max_cache_bytes is not None and held > rules.max_cache_bytes:
        broken.append(f"it holds {held} bytes, more than max_cache_bytes={rules.max_cache_bytes}")
    objective = apart = np.nan
    error = error_apart = np.full(stats.num_prompts, np.nan)
    if not broken:
        prices = [
            _price(stats, row, step, rules)
            for row in rows
            for step in range(stats.num_steps)
            if row.anchor[step] >= 0
        ]
        objective = sum(price for price, _ in prices)
        apart = sum(price for _, price in prices)
        error, error_apart = _final_error(stats, rows)
    return Verification(
        broken=tuple(broken),
        cost_ms=cost,
        objective=float(objective),
        objective_rounding=float(_ROUNDING * max(rules.power, 1.0) * apart),
        cache_bytes=held,
        error=error,
        error_rounding=_ROUNDING * error_apart,
    )


def _name(stats: CalibrationStats, row: Row) -> str:
    return "step" if row.group is None else stats.groups[row.group].name


def _runs(rows: Sequence[Row], steps: int) -> list[bool]:
    for row in rows:
        if row.group is None:
            return list(row.refresh)
    return [True] * steps


def _broken_rules(stats: CalibrationStats, rows: Sequence[Row], rules: Rules) -> list[str]:
    broken = []
    steps = stats.num_steps
    runs = _runs(rows, steps)
    for row in rows:
        name = _name(stats, row)
        lengths = {len(row.refresh), len(row.anchor), len(row.base), len(row.weight)}
        if lengths != {steps}:
            broken.append(f"{name} has rows of lengths {sorted(lengths)} for {steps} steps")
            continue
        if not row.refresh[0]:
            broken.append(f"{name} is not refreshed at step 0")
            continue
        broken += _broken_taps(name, row, rules.depth)
        seen: list[int] = []
        for step in range(steps):
            at = f"{name} at step {step}"
            anchor, base, weight = row.anchor[step], row.base[step], row.weight[step]
            if not np.isfinite(weight):
                broken.append(f"{at} has weight {weight}")
            if row.refresh[step]:
                if anchor >= 0:
                    broken.append(f"{at} is refreshed and has an anchor")
                if row.group is not None and not runs[step]:
                    broken.append(f"{at} is refreshed where the step is skipped")
                if base >= 0 and (row.group is not None or not seen or base != seen[-1]):
                    broken.append(f"{at} corrects with step {base}, not its refresh before")
                if base < 0 and weight != 0:
                    broken.append(f"{at} has a weight and nothing to multiply")
                seen.append(step)
                continue
            if step in rules.forced and (row.group is None or runs[step]):
                broken.append(f"{at} is not refreshed, though forced")
            if row.group is not None and not runs[step]:
                if anchor >= 0 or base >= 0 or weight != 0:
                    broken.append(f"{at} is cached where the step is skipped")
                continue
            if anchor < 0:
                broken.append(f"{at} is idle, but the step is run")
                continue
            if anchor != seen[-1]:
                broken.append(f"{at} has anchor {anchor}, not its last refresh {seen[-1]}")
                continue
            reach = step - (base if base >= 0 else anchor)
            if row.group is not None and reach > stats.max_lag:
                broken.append(f"{at} reaches back {reach} steps; {stats.max_lag} were measured")
            if rules.max_gap is not None and step - anchor > rules.max_gap:
                broken.append(
                    f"{at} is {step - anchor} steps from its anchor; {rules.max_gap} may be"
                )
            if base >= 0 and base not in seen[max(0, len(seen) - 1 - rules.history) : -1]:
                broken.append(f"{at} has base {base}, not one of {rules.history} refreshes before")
            if base < 0 and weight != 0:
                broken.append(f"{at} has a weight and nothing to multiply")
    return broken


def _broken_taps(name: str, row: Row, depth: int) -> list[str]:
    if row.taps is None:
        return []
    if row.group is not None or len(row.taps) != len(row.refresh):
        return [f"{name} has {len(row.taps)} lists of taps for {len(row.refresh)} steps"]
    broken = []
    if any(weight != 0 for weight in row.weight):
        broken.append(f"{name} has taps and weights")
    for step, pairs in enumerate(row.taps):
        before = [source for source in range(step) if row.refresh[source]]
        reach = before[-depth:] if row.refresh[step] and depth > 0 else []
        for source, tap in pairs:
            if source not in reach:
                broken.append(
                    f"{name} at step {step} reads step {source}, not one of {depth} refreshes "
                    "before a refresh"
                )
            if not math.isfinite(tap):
                broken.append(f"{name} at step {step} has a coefficient of {tap}")
    return broken


def _cost(stats: CalibrationStats, rows: Sequence[Row]) -> float:
    """Milliseconds of the transformer: the rest of every run step, and what is refreshed."""
    cost = 0.0
    grouped = {row.group for row in rows if row.group is not None}
    for runs in _runs(rows, stats.num_steps):
        if runs:
            cost += stats.rest_ms
            # Blocks of groups without a row are computed wherever the transformer runs.
            cost += sum(
                float(ms) for group, ms in enumerate(stats.group_ms) if group not in grouped
            )
    for row in rows:
        if row.group is not None:
            cost += float(stats.group_ms[row.group]) * sum(bool(cell) for cell in row.refresh)
    return cost


def _peak_bytes(stats: CalibrationStats, rows: Sequence[Row]) -> int:
    """Peak over steps of what is stored: each tensor from its step to its last reader."""
    steps = stats.num_steps
    held = [0] * steps
    for row in rows:
        size = stats.velocity_bytes if row.group is None else stats.group_bytes[row.group]
        for source in range(len(row.anchor)):
            for readers in _readers(row, source):
                for now in range(source, max(readers, default=source - 1) + 1):
                    held[now] += size
        if row.group is None:
            for now in range(steps):
                if row.anchor[now] >= 0 or (now + 1 < steps and row.anchor[now + 1] >= 0):
                    held[now] += stats.output_bytes
    return max(held)


def _readers(row: Row, source: int) -> list[list[int]]:
    """Steps that read each of the tensors that a refresh leaves: its output, and a mean of it."""
    later = range(source + 1, len(row.anchor))
    repeating = [step for step in later if row.anchor[step] == source]
    if row.taps is None or len(row.taps) != len(row.anchor):
        return [repeating + [step for step in later if row.base[step] == source]]
    tapping = [step for step in later if any(s == source for s, _ in row.taps[step])]
    return [tapping, repeating] if row.taps[source] else [tapping + repeating]


def _delta(stats: CalibrationStats, row: Row, prompt: int, step: int, source: int) -> FloatArray:
    """(S,) change of the velocity at `step` if the unit reuses what it had at `source`."""
    if row.group is None:
        velocity: FloatArray = stats.velocities[prompt].astype(np.float64)
        found: FloatArray = velocity[source] - velocity[step]
        return found
    measured: FloatArray = stats.deltas[prompt, step, row.group, step - source - 1]
    return measured.astype(np.float64)


def _price(stats: CalibrationStats, row: Row, step: int, rules: Rules) -> tuple[float, float]:
    """Price of one cached cell under the pricing rule's own gain, not the row's.

    The second number is what it would be if reuse and prediction did not cancel.
    """
    anchor, base = row.anchor[step], row.base[step]
    sigma = stats.sigmas.astype(np.float64)
    reuse = [_delta(stats, row, p, step, anchor) for p in range(stats.num_prompts)]
    squares = apart = [float(x @ x) for x in reuse]
    if base >= 0:
        rise = (sigma[step] - sigma[anchor]) / (sigma[anchor] - sigma[base])
        moves = [rise * (x - _delta(stats, row, p, step, base)) for p, x in enumerate(reuse)]
        norm = sum(float(y @ y) for y in moves)
        if rules.gains == "unit" or norm == 0:
            gain = 1.0
        elif rules.gains == "none":
            gain = 0.0
        else:
            inner = sum(float(x @ y) for x, y in zip(reuse, moves, strict=True))
            # Least squares with 2 % of the norm as a pull towards 1, within -1 and 4.
            gain = min(max((0.02 - inner / norm) / 1.02, -1.0), 4.0)
        squares = [
            float((x + gain * y) @ (x + gain * y)) for x, y in zip(reuse, moves, strict=True)
        ]
        apart = [
            float((abs(x) + abs(gain * y)) @ (abs(x) + abs(gain * y)))
            for x, y in zip(reuse, moves, strict=True)
        ]
    move = (sigma[step + 1] - sigma[step]) * _growth(stats)[step]
    price, most = (
        float((move**2 * sum(values) / len(values) / stats.numel) ** rules.power)
        for values in (squares, apart)
    )
    return price, most


def _growth(stats: CalibrationStats) -> list[float]:
    """Geometric mean amplification of each step, never below that of a later one."""
    found: list[float] = []
    for step in reversed(range(stats.num_steps)):
        logs = [math.log(float(row[step])) for row in stats.amplification]
        found.append(max(math.exp(sum(logs) / len(logs)), found[-1] if found else 0.0))
    return found[::-1]


def _final_error(stats: CalibrationStats, rows: Sequence[Row]) -> tuple[FloatArray, FloatArray]:
    """(P,) predicted mean squared error of the final latent, cell by cell.

    The second array is what it would be if nothing cancelled.
    """
    sigma = stats.sigmas.astype(np.float64)
    growth = [*_growth(stats), 0.0]
    result, apart = np.zeros(stats.num_prompts), np.zeros(stats.num_prompts)
    for prompt in range(stats.num_prompts):
        total: FloatArray = np.zeros(stats.velocities.shape[2])
        most: FloatArray = np.zeros_like(total)
        for step in range(stats.num_steps):
            move = sigma[step + 1] - sigma[step]
            for row in rows:
                anchor, base, weight = row.anchor[step], row.base[step], row.weight[step]
                moved: FloatArray = np.zeros_like(total)
                change: FloatArray = np.zeros_like(total)
                if row.taps is not None:
                    # A refreshed step moves by nothing, a skipped one by what its anchor left.
                    source = step if row.refresh[step] else anchor
                    if source != step:
                        moved = _delta(stats, row, prompt, step, source)
                    for earlier, tap in row.taps[source]:
                        added = tap * (moved - _delta(stats, row, prompt, step, earlier))
                        change = change + added
                        most += abs(move) * abs(added)
                elif anchor >= 0:
                    moved = _delta(stats, row, prompt, step, anchor)
                    if base >= 0:
                        change = weight * (moved - _delta(stats, row, prompt, step, base))
                elif row.refresh[step] and base >= 0:
                    change = -weight * _delta(stats, row, prompt, step, base)
                total += move * (moved + change)
                most += abs(move) * (abs(moved) + abs(change))
            grown = growth[step] ** 2 - growth[step + 1] ** 2
            result[prompt] += grown * float(total @ total) / stats.numel
            apart[prompt] += grown * float(most @ most) / stats.numel
    return result, apart
