"""What the error model passes on from one computed step to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from layercache.stats import FloatArray

Cells = tuple[tuple[int, tuple[int, ...]], ...]
"""The cached groups of a computed step, with the steps that each reads."""


@dataclass(frozen=True)
class Stretch:
    """A computed step and those until the next: what one row of taps is responsible for.

    `moved` says whether the plan moves the latent: from the first skipped step on, and under
    Euler's method, whose own moves are the same, from the first cached group on. Before, the
    sampler does. Where that calls the model twice a step, the plan always does.
    """

    start: int
    stop: int
    cells: Cells
    moved: bool


@dataclass(frozen=True, eq=False)
class Passed:
    """The computed steps that a row may read, latest first: h of them.

    Attributes:
        vectors: (h, 3, P, N) velocity, and S on arriving there, growth along and turned.
        sizes: (h, 3, P) of what is known by its size only: I, and D, along and turned.
        last: Which step the latest is.
    """

    vectors: FloatArray
    sizes: FloatArray
    last: int


@dataclass(frozen=True, eq=False)
class State:
    """On arriving at a step.

    Attributes:
        error: (2, P, N) S, growth along and turned.
        drift: (2, P) D.
        passed: The computed steps before.
        taps: Of the last one.
        changes: x (G, P, N) of the steps before at which groups were cached and that a residual may
            yet be read of.
    """

    error: FloatArray
    drift: FloatArray
    passed: Passed
    taps: tuple[float, ...] = ()
    changes: Mapping[int, FloatArray] = field(default_factory=dict)
