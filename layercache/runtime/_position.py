"""Where a run stands: which step and which branch a transformer call belongs to.

Nothing is asked of the pipeline. A run begins when the scheduler has new sigmas. The step is the
scheduler's own index; of a scheduler without one, the `step_index` that a `cache_context` tells, or
else the count of its steps. (The scheduler goes first, since an image-to-image pipeline's loop
counts from 0 where the scheduler does not.) A branch is the name of the `cache_context` that the
call is made in, and the ordinal of the call under that name within one step.

A run is over when the scheduler reached its end, or has new sigmas. Calls by another pipeline never
get here: see `runtime.run`.
"""

from __future__ import annotations

import bisect
from collections import Counter
from typing import Any

from layercache.models._foreign import counts_steps, starts_anywhere
from layercache.models.stepping import first_calls, listed_sigmas, sigmas_of, step_index
from layercache.runtime._groups import Branch

SIGMA_TOLERANCE = 1e-4


class Position:
    """Reads the scheduler. `advance` is called once per transformer call."""

    def __init__(self, scheduler: Any, plan_sigmas: tuple[float, ...]) -> None:
        self.step = -1
        self.offset = 0
        self.twice = False
        self._first_calls: list[int] = []
        self._scheduler = scheduler
        self._sigmas: Any = None
        # The training schedule, which a scheduler of diffusers has from the start, is no run.
        self._training: Any = None
        unset = getattr(scheduler, "num_inference_steps", None) is None
        if unset and compare_sigmas(plan_sigmas, sigmas_of(scheduler))[1] is not None:
            self._training = scheduler.sigmas
        self._steps_done = 0
        self._ordinals: Counter[str | None] = Counter()

    def advance(self, told: int | None) -> tuple[bool, int] | None:
        """Whether a run begins with this call, and which step it is of; None outside of runs.

        Args:
            told: The step that a `cache_context` tells, if one does.
        """
        scheduler = self._scheduler
        sigmas = scheduler.sigmas
        begins = sigmas is not self._sigmas
        if sigmas is self._training:
            return None
        if begins:
            listed = listed_sigmas(scheduler)
            self._first_calls = first_calls(listed)
            self.twice = len(self._first_calls) < len(listed) - 1
        call = self._index(begins, told)
        index = self.locate(call)[0]
        # Some schedulers keep their sigmas from one run to the next.
        begins = begins or index + self.offset < self.step
        if not counts_steps(scheduler) and told is None and call >= len(sigmas) - 1:
            # Nothing but the count of its steps tells where such a scheduler stands.
            begins, call, index = True, 0, 0
        if call >= len(sigmas) - 1:
            return None
        return begins, index

    def locate(self, call: int) -> tuple[int, bool]:
        """Which step a call of the scheduler's is of, and whether it is that step's second."""
        if not self.twice:
            return call, False
        step = bisect.bisect_right(self._first_calls, call) - 1
        return step, self._first_calls[step] != call

    def begin(self) -> None:
        """A run begins."""
        self._sigmas = self._scheduler.sigmas
        self.step, self._steps_done = -1, 0
        self._ordinals.clear()

    def enter(self, step: int) -> None:
        """A step begins."""
        self.step = step
        self._ordinals.clear()

    def branch(self, context: str | None) -> Branch:
        """The branch of the call under way, made in this `cache_context`, counted."""
        ordinal = self._ordinals[context]
        self._ordinals[context] += 1
        return (context, ordinal)

    def stepped(self) -> None:
        """The scheduler makes its step."""
        self._steps_done += 1
        self._ordinals.clear()

    @property
    def under_way(self) -> bool:
        """Whether the scheduler is in the run that was begun last."""
        return self._scheduler.sigmas is self._sigmas

    def _index(self, begins: bool, told: int | None) -> int:
        if self.offset < 0 and starts_anywhere(self._scheduler):
            # A plan of the schedule's end starts there, until the scheduler has found out.
            return self._first_calls[-self.offset]
        if counts_steps(self._scheduler):
            return step_index(self._scheduler)
        if told is not None:
            return told
        return 0 if begins else self._steps_done


def compare_sigmas(mine: tuple[float, ...], given: tuple[float, ...]) -> tuple[int, str | None]:
    """How a run's noise levels (T+1) fit a plan's.

    Either may be the last part of the other: an image-to-image pipeline hands over the end of its
    schedule, or starts in the midst of it, and its plan holds the steps that it makes.

    Returns:
        What to add to the scheduler's index for the plan's step; and what differs, in words, or
        None.
    """
    offset = len(mine) - len(given)
    pairs = zip(mine[max(offset, 0) :], given[max(-offset, 0) :], strict=True)
    worst = max((abs(a - b) for a, b in pairs), default=float("inf"))
    if min(len(mine), len(given)) > 1 and worst <= SIGMA_TOLERANCE:
        return offset, None
    if offset:
        return offset, f"it has {len(given) - 1} steps and the plan {len(mine) - 1}"
    return offset, f"its sigmas differ from the plan's by up to {worst:.4g}"
