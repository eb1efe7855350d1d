"""Uniform step skipping: the transformer runs at evenly spaced steps, and its output is reused."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from layercache.evaluation.peers.skipping import skip_steps


def uniform_steps(steps: int, budget: int) -> tuple[bool, ...]:
    """(T,) with exactly `budget` true entries, evenly spaced, the first among them.

    Example:
        >>> uniform_steps(6, 3)
        (True, False, True, False, True, False)
    """
    if not 1 <= budget <= steps:
        raise ValueError(f"budget={budget} fresh steps of {steps}: 1 to {steps} are possible")
    chosen = {i * steps // budget for i in range(budget)}
    return tuple(step in chosen for step in range(steps))


@dataclass(frozen=True)
class Uniform:
    """Plain reuse of the last guided output, on an even grid: what any schedule must beat."""

    fresh: tuple[bool, ...]
    predicted_speedup: float | None = None
    name: str = "uniform"
    call_changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def compute_share(self) -> float:
        """Share of steps at which the transformer runs."""
        return sum(self.fresh) / len(self.fresh)

    def attach(self, pipe: Any) -> AbstractContextManager[None]:
        """Skip the steps that are not fresh."""
        # The pipeline's guidance, applied to repeated outputs, repeats its own result.
        return skip_steps(pipe, self.fresh, lambda: lambda index, velocity, sample: velocity)
