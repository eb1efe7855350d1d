"""`UnitPlan` and `Schedule`: one row of a plan file, as written and as resolved to step numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator

from layercache.errors import PlanError

REFRESH = "#"
IDLE = "."
SPANS = "0123456789abcdefghijklmnopqrstuvwxyz"
MAX_SPAN = len(SPANS) - 1
MAX_TAPS = 35
MAX_TAP_SUM = 1e6
"""Of the absolute coefficients of one step; beyond, float32 has nothing left of the velocity."""


class Frozen(BaseModel):
    """A part of a plan: immutable, without unknown keys, NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Schedule:
    """A unit's row, resolved to step numbers.

    All tuples have one entry a step. `anchor` and `base` are -1 where there is none. `weight` is
    the factor w of the prediction `r_anchor + w (r_anchor - r_base)`, or of the correction
    `v + w (v - v_base)` at a refreshed step. `last_use[s]` is the last step that reads what step s
    stored, or -1.

    A row with multistep coefficients has `taps`: at each refreshed step the pairs (s, b) of the
    mean velocity `v + sum b (v - v_s)`, which the steps until the next refresh repeat, and which
    step `last_mixed[a]` is the last to read. Its weights are 0.
    """

    refresh: tuple[bool, ...]
    cached: tuple[bool, ...]
    anchor: tuple[int, ...]
    base: tuple[int, ...]
    weight: tuple[float, ...]
    last_use: tuple[int, ...]
    taps: tuple[tuple[tuple[int, float], ...], ...] | None = None
    last_mixed: tuple[int, ...] = ()

    def stored_at(self, step: int) -> int:
        """How many of this unit's tensors are held while `step` runs."""
        return sum(
            1
            for uses in (self.last_use, self.last_mixed)
            for s, last in enumerate(uses[: step + 1])
            if last >= max(step, s + 1)
        )


class UnitPlan(Frozen):
    """One row: the whole step (`kind="step"`), or a group of blocks.

    `cells` has one symbol a step: `#` computed; `0` the anchor reused; `1`-`9`, `a`-`z` predicted
    with span K = 1..35, whose base is the unit's latest refresh at least K steps before its anchor;
    `.` (groups only) idle, since the whole step is skipped. `gains` has one number a step, or is
    absent for the published predictor (gain 1 wherever K > 0).

    A step unit may have `taps` instead of gains: for each step a list b_1, b_2, ... of multistep
    coefficients, empty where the step is not computed. The scheduler then receives
    `v + sum_h b_h (v - v_h)`, v_h the output of the h-th computed step before, at that step and at
    the skipped ones after it; the spans in `cells` only say how the solver priced them.
    """

    kind: Literal["step", "group"]
    cells: str
    block_list: str | None = None
    start: int | None = None
    stop: int | None = None
    gains: tuple[float, ...] | None = None
    taps: tuple[tuple[float, ...], ...] | None = None

    @property
    def name(self) -> str:
        """`step`, or for example `transformer_blocks[0:8]`."""
        return "step" if self.kind == "step" else f"{self.block_list}[{self.start}:{self.stop}]"

    @model_validator(mode="after")
    def _valid(self) -> UnitPlan:
        place = (self.block_list, self.start, self.stop)
        if self.kind == "step" and place != (None, None, None):
            raise ValueError("the step unit has no block_list, start or stop")
        if self.kind == "group":
            if self.block_list is None or self.start is None or self.stop is None:
                raise ValueError("a group needs block_list, start and stop")
            if not 0 <= self.start < self.stop:
                raise ValueError(f"blocks {self.start}:{self.stop} are none")
        if not self.cells.startswith(REFRESH):
            raise ValueError(f"cells[0] is {self.cells[:1]!r}; the first step must be refreshed")
        for step, symbol in enumerate(self.cells):
            if (
                symbol not in SPANS
                and symbol != REFRESH
                and (symbol != IDLE or self.kind == "step")
            ):
                raise ValueError(f"cells[{step}] is {symbol!r}, which is no symbol of this unit")
        if self.gains is not None and len(self.gains) != len(self.cells):
            raise ValueError(f"{len(self.gains)} gains for {len(self.cells)} cells")
        if self.taps is not None:
            self._check_taps(self.taps)
        return self

    def _check_taps(self, taps: tuple[tuple[float, ...], ...]) -> None:
        if self.kind != "step" or self.gains is not None:
            raise ValueError("taps stand in the step unit only, and instead of gains")
        if len(taps) != len(self.cells):
            raise ValueError(f"{len(taps)} lists of taps for {len(self.cells)} cells")
        computed = 0
        for step, (symbol, row) in enumerate(zip(self.cells, taps, strict=True)):
            most = min(computed, MAX_TAPS) if symbol == REFRESH else 0
            if len(row) > most:
                raise ValueError(
                    f"taps[{step}] has {len(row)} coefficients and the cell is {symbol!r} with "
                    f"{computed} computed steps before it: {most} can be"
                )
            if sum(abs(tap) for tap in row) > MAX_TAP_SUM:
                raise ValueError(
                    f"taps[{step}] add up to {sum(abs(tap) for tap in row):g} in absolute value; "
                    f"{MAX_TAP_SUM:g} can be"
                )
            computed += symbol == REFRESH

    def schedule(self, sigmas: tuple[float, ...]) -> Schedule:
        """Anchors, bases and weights of every step.

        Raises:
            PlanError: A span reaches before the unit's first refresh, or a gain stands where no
                prediction is made.
        """
        steps = len(self.cells)
        refreshes: list[int] = []
        anchor, base, weight = [-1] * steps, [-1] * steps, [0.0] * steps
        for step, symbol in enumerate(self.cells):
            gain = None if self.gains is None else self.gains[step]
            if symbol == REFRESH:
                if gain:
                    if self.kind != "step" or not refreshes:
                        raise PlanError(
                            f"{self.name}.gains[{step}] is {gain}, but a refreshed "
                            "cell takes a gain only in the step unit, after its first refresh"
                        )
                    base[step], weight[step] = refreshes[-1], gain
                refreshes.append(step)
            elif symbol != IDLE:
                anchor[step] = refreshes[-1]
                span = SPANS.index(symbol)
                if span == 0:
                    if gain:
                        raise PlanError(
                            f"{self.name}.gains[{step}] is {gain}, but the cell is plain reuse "
                            "(K = 0): set the gain to 0 or give the cell a span"
                        )
                    continue
                earlier = [s for s in refreshes if s <= anchor[step] - span]
                if not earlier:
                    raise PlanError(
                        f"{self.name}.cells[{step}] has span {span}, but no refresh lies that far "
                        f"before its anchor, step {anchor[step]}"
                    )
                base[step] = earlier[-1]
                slope = sigmas[anchor[step]] - sigmas[base[step]]
                rise = (sigmas[step] - sigmas[anchor[step]]) / slope
                weight[step] = (1.0 if gain is None else gain) * rise
                if not math.isfinite(weight[step]):
                    raise PlanError(
                        f"{self.name}.cells[{step}] has gain {gain} and a rise of {rise:g}: their "
                        "product is no finite weight"
                    )
            elif gain:
                raise PlanError(f"{self.name}.gains[{step}] is {gain} at an idle cell")
        last_use = [-1] * steps
        for step in range(steps):
            for source in (anchor[step], base[step]):
                if source >= 0:
                    last_use[source] = step
        found = Schedule(
            refresh=tuple(c == REFRESH for c in self.cells),
            cached=tuple(c in SPANS for c in self.cells),
            anchor=tuple(anchor),
            base=tuple(base),
            weight=tuple(weight),
            last_use=tuple(last_use),
        )
        return found if self.taps is None else _multistep(found, self.taps)


def _multistep(schedule: Schedule, taps: Sequence[Sequence[float]]) -> Schedule:
    """The row with taps resolved to step numbers, and with what they read instead of bases."""
    steps = len(taps)
    computed = [step for step in range(steps) if schedule.refresh[step]]
    pairs: list[tuple[tuple[int, float], ...]] = [()] * steps
    last_use, last_mixed = [-1] * steps, [-1] * steps
    for number, step in enumerate(computed):
        row = enumerate(taps[step], 1)
        pairs[step] = tuple((computed[number - back], tap) for back, tap in row if tap)
        for source, _ in pairs[step]:
            last_use[source] = step
    for step, anchor in enumerate(schedule.anchor):
        if anchor >= 0:
            uses = last_mixed if pairs[anchor] else last_use
            uses[anchor] = max(uses[anchor], step)
    return replace(
        schedule,
        weight=(0.0,) * steps,
        last_use=tuple(last_use),
        taps=tuple(pairs),
        last_mixed=tuple(last_mixed),
    )
