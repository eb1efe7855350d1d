"""`Options`: how plans are compiled, checked where they come in, and written into the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar, TypedDict

from pydantic import ConfigDict

from layercache.errors import OptionError

SOLVERS = ("search", "dp", "greedy", "milp")
UNITS = ("step", "groups")
PREDICTORS = ("fitted", "published", "reuse")


class Changes(TypedDict, total=False):
    """The fields of `Options`, as keyword arguments for type checkers."""

    solver: str
    units: Sequence[str]
    predictor: str
    max_cache_bytes: int | None
    max_gap: int | None
    forced: Sequence[int]
    sigmas: Sequence[float] | None


@dataclass(frozen=True, kw_only=True)
class Options:
    """How plans are compiled, for `compile_plan`, `pareto` and the command line.

    Numpy's numbers become Python's, since all options are written into plan files.

    Attributes:
        solver: `"search"` makes the predicted error small; `"dp"` the sum of separable prices, with
            a proven bound; `"greedy"` is the published allocator; `"milp"` the slow reference.
        units: What may be cached: whole steps (`"step"`), groups of blocks (`"groups"`), or both.
        predictor: `"fitted"` taps; `"published"`, the one tap that the noise levels give; `"reuse"`
            of the last computed value.
        max_cache_bytes: Limit on stored tensors for one image.
        max_gap: Most steps between a cached cell and its anchor.
        forced: Steps at which everything is computed, besides the first.
        sigmas: Compile for this schedule of T+1 noise levels (`sigmas_for` gives those of another
            step count, shift or size) by interpolating the statistics; the plan's provenance says
            so.

    Raises:
        OptionError: An option is unknown or not of its type.

    Example:
        >>> Options(units="step", forced=(0, 8)).units
        ('step',)
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    solver: str = "search"
    units: Sequence[str] = UNITS
    predictor: str = "fitted"
    max_cache_bytes: int | None = None
    max_gap: int | None = None
    forced: Sequence[int] = ()
    sigmas: Sequence[float] | None = None

    def __post_init__(self) -> None:
        for name, known in (("solver", SOLVERS), ("predictor", PREDICTORS)):
            if (value := getattr(self, name)) not in known:
                raise OptionError(f"{name} is {value!r}; use {' or '.join(map(repr, known))}")
        units = (self.units,) if isinstance(self.units, str) else _sequence("units", self.units)
        if not units or not set(units) <= set(UNITS):
            raise OptionError(f"units is {units!r}; use 'step', 'groups' or both")
        forced = tuple(whole("a forced step", s) for s in _sequence("forced", self.forced))
        changed: dict[str, Any] = {"units": units, "forced": forced}
        for name in ("max_gap", "max_cache_bytes"):
            if (value := getattr(self, name)) is not None:
                changed[name] = whole(name, value)
                if changed[name] < 0:
                    raise OptionError(f"{name} is {value}; it must be at least 0")
        if self.sigmas is not None:
            try:
                changed["sigmas"] = tuple(float(s) for s in _sequence("sigmas", self.sigmas))
            except (TypeError, ValueError) as error:
                raise OptionError(f"sigmas is {self.sigmas!r}; it must hold T+1 numbers") from error
        for name, value in changed.items():
            object.__setattr__(self, name, value)

    def check_steps(self, steps: int) -> None:
        """Refuse forced steps that a schedule of so many steps does not have.

        Raises:
            OptionError: A step is beyond the last one.
        """
        if any(not 0 <= step < steps for step in self.forced):
            raise OptionError(f"forced is {sorted(self.forced)}; steps are 0 to {steps - 1}")


def whole(name: str, value: Any) -> int:
    """`value` as a Python int: numpy integers and floats without a fraction are fine.

    Raises:
        OptionError: It is not a whole number.

    Example:
        >>> whole("max_cache_bytes", 1e9)
        1000000000
    """
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, Real) and not isinstance(value, bool) and float(value).is_integer():
        return int(float(value))
    raise OptionError(f"{name} is {value!r}; it must be a whole number")


def _sequence(name: str, values: Any) -> tuple[Any, ...]:
    try:
        return tuple(values)
    except TypeError as error:
        raise OptionError(f"{name} is {values!r}; it must be a sequence") from error
