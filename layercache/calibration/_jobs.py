"""Which replays each step of a calibration run needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from layercache.errors import StatsError

Mode = Literal["replay", "residual"]
MODES: tuple[str, ...] = get_args(Mode)
SCALE_STEPS = 5
"""Steps at which residual mode replays each group once."""


@dataclass(frozen=True)
class Jobs:
    """The (group, lag) pairs to replay, by step.

    Attributes:
        mode: In `"replay"` mode every group at every lag; in `"residual"` mode every group at lag 1
            and only at a few steps, evenly spaced from the second to the last.
        steps: T.
        groups: G.
        lags: M.

    Example:
        >>> jobs = Jobs("residual", steps=8, groups=2, lags=3)
        >>> jobs.scale_steps, jobs.at(1), jobs.at(3)
        ((1, 2, 4, 6, 7), ((0, 1), (1, 1)), ())
    """

    mode: str
    steps: int
    groups: int
    lags: int

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise StatsError(f"mode is {self.mode!r}; use {' or '.join(map(repr, MODES))}")

    @property
    def measures(self) -> bool:
        """Whether deltas are what replays show, or residuals stand in for those of any group."""
        return self.mode == "replay" or self.groups == 0

    @cached_property
    def scale_steps(self) -> tuple[int, ...]:
        """Steps at which residual mode replays."""
        last = self.steps - 1
        count = min(SCALE_STEPS, last)
        spaced = (1 + i * (last - 1) / max(count - 1, 1) for i in range(count))
        return tuple(round(step) for step in spaced)

    def at(self, step: int) -> tuple[tuple[int, int], ...]:
        """The pairs of one step, by group; none at step 0, which has no history."""
        if self.mode == "replay":
            lags = range(1, min(self.lags, step) + 1)
            return tuple((group, lag) for group in range(self.groups) for lag in lags)
        if step in self.scale_steps:
            return tuple((group, 1) for group in range(self.groups))
        return ()

    @cached_property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """All pairs of a run."""
        return tuple(sorted({pair for step in range(self.steps) for pair in self.at(step)}))

    @property
    def history(self) -> int:
        """How many steps back residuals are needed."""
        return min(self.lags, max(1, self.steps - 1)) if self.mode == "replay" else 1
