"""The step unit on a pipeline: whole transformer calls that are skipped, and what replaces them.

What is predicted is the *guided* output, read where the scheduler's `step` receives it
(`runtime.executor`). The skipped transformer calls still have to return something that the
pipeline's own guidance arithmetic accepts; they return each branch's last computed output, and what
the pipeline makes of them is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from layercache.costs import STEP
from layercache.models.tensors import map_tensors, tensor_bytes
from layercache.plan import Schedule
from layercache.runtime._groups import Branch
from layercache.runtime.arithmetic import affine
from layercache.runtime.executor import StepExecutor


class StepRunner:
    """State of the step unit."""

    name = STEP

    def __init__(
        self, schedule: Schedule, sigmas: Sequence[float], on_problem: Callable[[str], None]
    ) -> None:
        self.schedule = schedule
        self.executor: StepExecutor[Tensor] = StepExecutor(schedule, sigmas, affine, _kept)
        self._on_problem = on_problem
        self._outputs: dict[Branch, Any] = {}
        self._callers: set[Branch] = set()
        self._shape: torch.Size | None = None
        self.bytes_per_output: dict[Branch, int] = {}
        self.peak_guided_bytes = 0

    def begin_run(self) -> None:
        """Start counting bytes anew."""
        self.bytes_per_output.clear()
        self.peak_guided_bytes = 0

    @property
    def held_bytes(self) -> int:
        """Bytes of all tensors held now."""
        return tensor_bytes(list(self._outputs.values())) + tensor_bytes(self.executor.held)

    def answer(self, step: int, branch: Branch) -> Any:
        """What a skipped call returns, or None if the call has to be computed."""
        if not self.schedule.cached[step]:
            return None
        if branch not in self._outputs or self.executor.repeated(step) is None:
            self._on_problem(f"step: what step {step} repeats was not stored")
            return None
        return map_tensors(_kept, self._outputs[branch])

    def computed(self, step: int, branch: Branch, output: Any) -> None:
        """Keep a computed output if the next step will be skipped."""
        if any(self.schedule.cached[step + 1 : step + 2]):
            # A copy, since pipelines may write into what the transformer returned to them.
            kept = map_tensors(_kept, output)
            self._outputs[branch] = kept
            self.bytes_per_output[branch] = tensor_bytes(kept)

    def guided(self, step: int, velocity: Tensor, called: Mapping[Branch, bool]) -> Tensor:
        """The velocity that the scheduler is to use instead of `velocity`, the pipeline's own.

        `called` are the step's calls, and whether each was computed.
        """
        if velocity.shape != self._shape:
            self.executor.clear()
            self._shape = velocity.shape
        if not all(called.values()):
            return self._repeated(step, velocity, called)
        if not self.schedule.computed[step]:
            return velocity
        mean = self.executor.compute(step, velocity)
        self._callers = set(called)
        held = tensor_bytes(self.executor.held)
        self.peak_guided_bytes = max(self.peak_guided_bytes, held)
        if mean is None:
            self._on_problem(f"step: what the taps of step {step} read was not stored")
            return velocity
        return mean

    def _repeated(self, step: int, velocity: Tensor, called: Mapping[Branch, bool]) -> Tensor:
        mean = self.executor.repeated(step)
        if mean is None:
            self._on_problem(f"step: what was stored for step {step} was lost within it")
            return velocity
        if any(called.values()) or set(called) != self._callers:
            # The pipeline calls otherwise from here on, so what is stored serves no later step.
            self._on_problem(f"step: the calls at step {step} are not those that it repeats")
            self.executor.clear()
            return velocity
        # A copy, since nothing is known of what the scheduler does with what it is given.
        return mean.clone().to(velocity)

    def finish_step(self, step: int) -> None:
        """Free what no step after `step` reads."""
        self.executor.finish(step)
        if not any(self.schedule.cached[step + 1 : step + 2]):
            self._outputs.clear()

    def flush(self, branch: Branch | None = None) -> None:
        """Drop what is held, of one branch or of all; guided outputs belong to all branches."""
        self.executor.clear()
        if branch is None:
            self._outputs.clear()
        else:
            self._outputs.pop(branch, None)


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()
