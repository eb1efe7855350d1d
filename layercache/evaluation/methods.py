"""The protocol of a method that is compared, and the methods that are plans.

A method names itself, says which share of full transformer compute it spends, and is attached to a
pipeline for the length of a `with` block, in which the ordinary `pipe(...)` runs accelerated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from layercache.plan import Plan
from layercache.runtime import apply_plan


class Method(Protocol):
    """What the comparison asks of a method.

    Attributes:
        name: As it stands in the table.
        compute_share: Transformer compute of one generation, 1 for the uncached run.
        predicted_speedup: Of the whole generation, or None where nothing predicts it.
        call_changes: Pipeline arguments that the method replaces.
    """

    @property
    def name(self) -> str: ...
    @property
    def compute_share(self) -> float: ...
    @property
    def predicted_speedup(self) -> float | None: ...
    @property
    def call_changes(self) -> Mapping[str, Any]: ...

    def attach(self, pipe: Any) -> AbstractContextManager[Any]:
        """Accelerate `pipe` within the context, and leave no trace after it."""


@dataclass(frozen=True)
class Uncached:
    """The pipeline as it is: the reference of every figure."""

    name: str = "uncached"
    compute_share: float = 1.0
    predicted_speedup: float | None = 1.0
    call_changes: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def attach(self, pipe: Any) -> Iterator[None]:
        """Do nothing."""
        yield


@dataclass(frozen=True)
class LayerCache:
    """A compiled plan, run by `layercache.runtime`."""

    plan: Plan
    name: str = "layercache"
    call_changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def compute_share(self) -> float:
        """The plan's own share."""
        return self.plan.predicted.compute_share

    @property
    def predicted_speedup(self) -> float | None:
        """The plan's own prediction."""
        return self.plan.predicted.speedup

    def attach(self, pipe: Any) -> AbstractContextManager[Any]:
        """Apply the plan."""
        context: AbstractContextManager[Any] = apply_plan(
            pipe, self.plan, component=self.plan.component
        )
        return context
