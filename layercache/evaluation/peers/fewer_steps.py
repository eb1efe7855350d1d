"""The honest control: the same pipeline, asked for fewer inference steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FewerSteps:
    """`steps` inference steps where the uncached run takes `full_steps`.

    It needs no cache and no calibration. A method that does not beat it is not worth its trouble.
    """

    steps: int
    full_steps: int
    predicted_speedup: float | None = None
    name: str = "fewer-steps"

    @property
    def compute_share(self) -> float:
        """Steps taken of the steps of the uncached run."""
        return self.steps / self.full_steps

    @property
    def call_changes(self) -> Mapping[str, Any]:
        """The lower `num_inference_steps`."""
        return {"num_inference_steps": self.steps}

    @contextmanager
    def attach(self, pipe: Any) -> Iterator[None]:
        """Do nothing: the pipeline is only called otherwise."""
        yield
