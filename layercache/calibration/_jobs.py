"""Which replays each step of a calibration run needs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from layercache.errors import StatsError

Mode = Literal["replay", "residual"]
MODES: tuple[str, ...] = get_args(Mode)
SCALE_STEPS = 5
"""Steps at which residual mode replays each group once, and replay mode two groups at a time."""
JOINT_SHARE = 0.25
"""Most replays of two groups, as a share of those of one. They run from the first of the two on,
and so take a third longer on average: a third of the time at most."""

Replay = tuple[tuple[int, ...], int]
"""The groups that are replaced, and by residuals of how many steps ago."""


@dataclass(frozen=True)
class Jobs:
    """The replays (groups, lag), by step.

    Attributes:
        mode: In `"replay"` mode every group at every lag, and at a few steps every two groups at
            once, at lag 1; in `"residual"` mode every group at lag 1 and only at a few steps. Those
            steps are evenly spaced from the second to the last.
        steps: T.
        groups: G.
        lags: M.

    Example:
        >>> jobs = Jobs("residual", steps=8, groups=2, lags=3)
        >>> jobs.scale_steps, jobs.at(1), jobs.at(3)
        ((1, 2, 4, 6, 7), (((0,), 1), ((1,), 1)), ())
        >>> Jobs("replay", steps=8, groups=2, lags=3).joint_steps
        (1, 2, 4, 6, 7)
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
        return self._spaced(SCALE_STEPS)

    @cached_property
    def couples(self) -> tuple[tuple[int, int], ...]:
        """All two groups, the one that runs first in front."""
        return tuple(itertools.combinations(range(self.groups), 2))

    @cached_property
    def joint_steps(self) -> tuple[int, ...]:
        """Steps at which two groups at a time are replayed; fewer or none where that takes long."""
        if self.mode != "replay" or not self.couples:
            return ()
        alone = sum(self.groups * min(self.lags, step) for step in range(self.steps))
        return self._spaced(min(SCALE_STEPS, int(JOINT_SHARE * alone / len(self.couples))))

    def _spaced(self, count: int) -> tuple[int, ...]:
        last = self.steps - 1
        count = min(count, last)
        shares = (i / (count - 1) if count > 1 else 0.5 for i in range(count))
        return tuple(round(1 + share * (last - 1)) for share in shares)

    def at(self, step: int) -> tuple[Replay, ...]:
        """The replays of one step, by groups; none at step 0, which has no history."""
        if self.mode == "replay":
            lags = range(1, min(self.lags, step) + 1)
            alone = tuple(((group,), lag) for group in range(self.groups) for lag in lags)
            if step in self.joint_steps:
                return (*alone, *((couple, 1) for couple in self.couples))
            return alone
        if step in self.scale_steps:
            return tuple(((group,), 1) for group in range(self.groups))
        return ()

    @cached_property
    def replays(self) -> tuple[Replay, ...]:
        """All kinds of replays of a run."""
        return tuple(sorted({replay for step in range(self.steps) for replay in self.at(step)}))

    @property
    def history(self) -> int:
        """How many steps back residuals are needed."""
        return min(self.lags, max(1, self.steps - 1)) if self.mode == "replay" else 1
