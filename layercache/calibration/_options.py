"""`Options`: how a calibration measures, checked where they come in."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TypedDict

from layercache.calibration._propagation import PROBES
from layercache.errors import StatsError

_LARGEST_SEED = 2**62
"""torch takes 64 bits, and parts of one residual have seeds that follow."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a calibration measures.

    Args:
        num_inference_steps: T, as the plan will be served.
        lags: M, the longest lag measured. Time grows by about G M / 2 forwards a step, less where
            groups are few.
        seed: With the prompt, it seeds the starting noise; it seeds the sketches too.
        batch_size: Prompts a pipeline call (strings only).
        sketch_size: S; the relative error of an inner product is about sqrt(2 / S).
        mode: `"replay"` measures velocity deltas. `"residual"` takes about one generation of time
            and lets the scaled differences of residuals stand in for them.
        probes: Perturbed runs a batch, which measure how errors grow; six in replay mode and none
            in residual mode if None.
        max_memory: Bytes that the run may use above the model on its device. Lags are replayed in
            smaller batches, residuals kept on the CPU, and outputs in temporary files where that is
            needed. None is 90 % of what is free on a GPU, and 4 GiB elsewhere.

    Raises:
        StatsError: A value is not of its type or out of range.

    Example:
        >>> Options(lags=4).perturbed_runs
        6
    """

    num_inference_steps: int = 50
    lags: int = 8
    seed: int = 0
    batch_size: int = 1
    sketch_size: int = 1024
    mode: str = "replay"
    probes: int | None = None
    max_memory: int | None = None

    def __post_init__(self) -> None:
        counts = ("num_inference_steps", "lags", "batch_size", "sketch_size")
        for name in (*counts, "seed", "probes", "max_memory"):
            value = getattr(self, name)
            if value is None and name in ("probes", "max_memory"):
                continue
            try:
                # NumPy's integers too; statistics keep them as JSON.
                object.__setattr__(self, name, int(operator.index(value)))
            except TypeError:
                raise StatsError(f"{name}={value!r}: it must be a whole number") from None
        if min(getattr(self, name) for name in counts) < 1:
            given = ", ".join(f"{name}={getattr(self, name)}" for name in counts)
            raise StatsError(f"{given}: each must be at least 1")
        if not -_LARGEST_SEED <= self.seed <= _LARGEST_SEED:
            raise StatsError(f"seed={self.seed}: it must have at most 62 bits")
        if self.perturbed_runs < 0:
            raise StatsError(f"probes={self.probes}: it must be at least 0")

    @property
    def perturbed_runs(self) -> int:
        """Probes of error growth a batch: none in residual mode if nothing is said."""
        if self.probes is not None:
            return self.probes
        return PROBES if self.mode == "replay" else 0


class OptionValues(TypedDict, total=False):
    """The fields of `Options`, as keyword arguments."""

    num_inference_steps: int
    lags: int
    seed: int
    batch_size: int
    sketch_size: int
    mode: str
    probes: int | None
    max_memory: int | None
