"""How a batch's time divides over what is done for it, so that a progress bar moves evenly."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

Tick = Callable[[float], None]
"""Told what share of a batch's work was just done."""


@dataclass(frozen=True)
class Pace:
    """Shares of a batch's time, which sum to 1.

    Attributes:
        recorded: (T,) each step of the recorded run, with its replays.
        forward: (T,) each step that a perturbed run computes.
        loop: One run of the pipeline in which no model is computed.
    """

    recorded: tuple[float, ...]
    forward: tuple[float, ...]
    loop: float

    @classmethod
    def of(
        cls, recorded: Iterable[float], forward: Iterable[float], loop: float, whole: float
    ) -> Pace:
        """From seconds: of each step, of a loop, and of all."""
        scale = 1 / max(whole, 1e-12)
        return cls(
            tuple(float(step) * scale for step in recorded),
            tuple(float(step) * scale for step in forward),
            loop * scale,
        )
