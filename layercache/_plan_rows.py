"""`UnitPlan` and `Schedule`: one row of a plan file, as written and as resolved to step numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator

from layercache.errors import PlanError

COMPUTED = "#"
IDLE = "."
SPANS = "0123456789abcdefghijklmnopqrstuvwxyz"
MAX_SPAN = len(SPANS) - 1
MAX_TAPS = 35
MAX_TAP_SUM = 1e6
"""Of the absolute taps of one cell; beyond, float32 has nothing left of what they multiply."""

Pairs = tuple[tuple[int, float], ...]


class Frozen(BaseModel):
    """A part of a plan: immutable, without unknown keys, NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Schedule:
    """A unit's row, resolved to step numbers. All tuples have one entry a step.

    A cell that is neither computed nor cached is idle: a group, where the step is skipped.

    Attributes:
        computed: Whether the unit is computed.
        cached: Whether it is predicted from what was computed before.
        anchor: The unit's last computed step before a cached cell, -1 elsewhere.
        reads: The taps as pairs (earlier step s, b). A group has them at cached cells, r_a + sum b
            (r_a - r_s); the step unit at computed steps a, m_a = u_a + sum b (u_a - u_s), which is
            what the steps from a to the next computed one use.
        last_use: At a computed step, the last step at which its value is read as itself; -1: never.
    """

    computed: tuple[bool, ...]
    cached: tuple[bool, ...]
    anchor: tuple[int, ...]
    reads: tuple[Pairs, ...]
    last_use: tuple[int, ...]

    def stored_at(self, step: int) -> int:
        """How many computed values are held while `step` runs, for later steps to read."""
        return sum(
            last >= max(step, source + 1) for source, last in enumerate(self.last_use[: step + 1])
        )

    def pauses_at(self, step: int) -> bool:
        """Whether `step` is skipped, or the first skipped step follows it."""
        return any(self.cached[step : step + 2])


class UnitPlan(Frozen):
    """One row: the whole step (`kind="step"`), or a group of blocks.

    `cells` has one symbol a step. The step unit is computed (`#`) or skipped (`0`). A group is
    computed (`#`), reused (`0`), predicted with span K (`1`-`9`, `a`-`z`), or idle (`.`), since the
    step is skipped.

    `taps` are coefficients b_1, b_2, ... of differences to the first, second, ... computed step of
    the unit before its anchor; a row for each step. The step unit has them at computed steps; none
    means that skipped steps repeat the output before. A group has them at cached cells; an empty
    row there is the published predictor with the symbol's span K, one tap (sigma_t - sigma_a) /
    (sigma_a - sigma_b) on the value of step b = a - K, which must be computed.

    Example:
        >>> UnitPlan(kind="step", cells="##0#", taps=((), (0.5,), (), ())).schedule((4, 3, 2, 1, 0))
        ... # doctest: +ELLIPSIS
        Schedule(computed=(True, True, False, True), ... reads=((), ((0, 0.5),), (), ()), ...)
    """

    kind: Literal["step", "group"]
    cells: str
    block_list: str | None = None
    start: int | None = None
    stop: int | None = None
    taps: tuple[tuple[float, ...], ...] | None = None

    @property
    def name(self) -> str:
        """`step`, or for example `transformer_blocks[0:8]`."""
        return "step" if self.kind == "step" else f"{self.block_list}[{self.start}:{self.stop}]"

    @property
    def positions(self) -> range:
        """Positions of a group's blocks in their list."""
        return range(self.start or 0, self.stop or 0)

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
        if not self.cells.startswith(COMPUTED):
            raise ValueError(f"cells[0] is {self.cells[:1]!r}; the first step must be computed")
        known = COMPUTED + (SPANS[0] if self.kind == "step" else SPANS + IDLE)
        for step, symbol in enumerate(self.cells):
            if symbol not in known:
                raise ValueError(f"cells[{step}] is {symbol!r}, which is no symbol of this unit")
        if self.taps is not None:
            self._check_taps(self.taps)
        return self

    def _check_taps(self, taps: tuple[tuple[float, ...], ...]) -> None:
        if len(taps) != len(self.cells):
            raise ValueError(f"taps has {len(taps)} rows for {len(self.cells)} cells")
        computed = 0
        for step, (symbol, row) in enumerate(zip(self.cells, taps, strict=True)):
            if self.kind == "step":
                most = computed if symbol == COMPUTED else 0
            else:
                most = computed - 1 if symbol in SPANS else 0
            if len(row) > min(most, MAX_TAPS):
                raise ValueError(
                    f"taps[{step}] has {len(row)} taps; the cell is {symbol!r} and "
                    f"{min(most, MAX_TAPS)} can be"
                )
            _check_sum(f"taps[{step}]", row)
            computed += symbol == COMPUTED

    def schedule(self, sigmas: Sequence[float]) -> Schedule:
        """The row at these noise levels, one more than it has cells.

        Raises:
            PlanError: A span does not lead to a computed step, or is not that of the taps.
        """
        steps = range(len(self.cells))
        computed = tuple(symbol == COMPUTED for symbol in self.cells)
        cached = tuple(symbol in SPANS for symbol in self.cells)
        anchor, reads = [-1] * len(self.cells), [()] * len(self.cells)  # type: list[int], list[Pairs]
        last_use = [-1] * len(self.cells)
        done: list[int] = []
        for step in steps:
            row = () if self.taps is None else self.taps[step]
            if cached[step]:
                anchor[step] = done[-1]
            if self.kind == "step":
                reads[step] = _pairs(row, done)
            elif cached[step]:
                reads[step] = self._predicted(step, row, done, sigmas)
                last_use[done[-1]] = step
            for source, _ in reads[step]:
                last_use[source] = step
            if computed[step]:
                done.append(step)
        return Schedule(computed, cached, tuple(anchor), tuple(reads), tuple(last_use))

    def _predicted(
        self, step: int, row: tuple[float, ...], done: list[int], sigmas: Sequence[float]
    ) -> Pairs:
        """What a group's cached cell reads besides its anchor, `done[-1]`."""
        span, anchor = SPANS.index(self.cells[step]), done[-1]
        place = f"{self.name}.cells[{step}]"
        if row:
            pairs = _pairs(row, done[:-1])
            reach = anchor - min((source for source, _ in pairs), default=anchor)
            if reach != span:
                raise PlanError(f"{place} has span {span}, but its taps reach {reach} steps back")
            return pairs
        if span == 0:
            return ()
        base = anchor - span
        if base not in done:
            raise PlanError(
                f"{place} has span {span}, but step {base}, that far before its anchor {anchor}, "
                "is not computed"
            )
        tap = (sigmas[step] - sigmas[anchor]) / (sigmas[anchor] - sigmas[base])
        _check_sum(place, (tap,))
        return ((base, tap),)


def _pairs(row: Sequence[float], done: Sequence[int]) -> Pairs:
    """Taps on the last, last but one, ... of the computed steps `done`; zeros read nothing."""
    return tuple((source, tap) for tap, source in zip(row, reversed(done), strict=False) if tap)


def _check_sum(place: str, taps: Sequence[float]) -> None:
    total = sum(abs(tap) for tap in taps)
    if not total <= MAX_TAP_SUM:
        raise PlanError(
            f"{place}: taps add up to {total:g} in absolute value; {MAX_TAP_SUM:g} can be"
        )
