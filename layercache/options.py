"""`Options`: how plans are compiled, checked where they come in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from layercache.errors import LayerCacheError
from layercache.solver import SOLVERS
from layercache.solver.gains import GAIN_MODES
from layercache.solver.problem import whole

HISTORY = 2
GAINS = (*GAIN_MODES, "multistep")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How plans are compiled; see `compile_plan`.

    Numpy's numbers become Python's, since all options are written into plan files.

    Raises:
        LayerCacheError: An option is unknown or not of its type.

    Example:
        >>> Options(units="step", forced=(0, 8)).units
        ('step',)
    """

    solver: str = "dp"
    units: Sequence[str] = ("step", "groups")
    gains: str = "multistep"
    power: float = 1.0
    max_cache_bytes: int | None = None
    history: int = HISTORY
    max_gap: int | None = None
    forced: Sequence[int] = ()
    sigmas: Sequence[float] | None = None

    @property
    def schedule_gains(self) -> str:
        """The gains that schedules are chosen with; multistep rows are fitted to the chosen one."""
        return "trajectory" if self.gains == "multistep" else self.gains

    def __post_init__(self) -> None:
        if self.solver not in tuple(SOLVERS):
            raise LayerCacheError(
                f"solver is {self.solver!r}; use {' or '.join(map(repr, sorted(SOLVERS)))}"
            )
        if self.gains not in GAINS:
            modes = ", ".join(map(repr, GAINS[:-1]))
            raise LayerCacheError(f"gains is {self.gains!r}; use {modes} or {GAINS[-1]!r}")
        if not isinstance(self.power, Real):
            raise LayerCacheError(f"power is {self.power!r}; it must be a number above 0")
        units = (self.units,) if isinstance(self.units, str) else _sequence("units", self.units)
        forced = tuple(whole("a forced step", s) for s in _sequence("forced", self.forced))
        changed: dict[str, Any] = {"units": units, "power": float(self.power), "forced": forced}
        changed["history"] = whole("history", self.history)
        for name in ("max_gap", "max_cache_bytes"):
            if (value := getattr(self, name)) is not None:
                changed[name] = whole(name, value)
        if self.sigmas is not None:
            try:
                changed["sigmas"] = tuple(float(s) for s in _sequence("sigmas", self.sigmas))
            except (TypeError, ValueError) as error:
                raise LayerCacheError(
                    f"sigmas is {self.sigmas!r}; it must hold T+1 numbers"
                ) from error
        for name, value in changed.items():
            object.__setattr__(self, name, value)


def _sequence(name: str, values: Any) -> tuple[Any, ...]:
    try:
        return tuple(values)
    except TypeError as error:
        raise LayerCacheError(f"{name} is {values!r}; it must be a sequence") from error
