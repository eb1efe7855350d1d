"""The step unit: whole transformer calls that are skipped, and the guided output in their place.

What is predicted is the *guided* output v, read where the scheduler's `step` receives it: at a
skipped step `v_a + w (v_a - v_b)`, at a refreshed step with a gain `v + w (v - v_previous)`. The
skipped transformer calls still have to return something that the pipeline's own guidance
arithmetic accepts; they return each branch's last computed output, and what the pipeline makes of
them is replaced.

A row with taps is a multistep method: a computed step hands on a mean of its own output and earlier
ones, and the skipped steps after it repeat that mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from layercache.plan import Schedule
from layercache.runtime.arithmetic import copied, mean_velocity, predict, tensor_bytes
from layercache.runtime.groups import Branch


class StepRunner:
    """State of the step unit."""

    def __init__(self, schedule: Schedule, on_problem: Callable[[str], None]) -> None:
        self.schedule = schedule
        self._on_problem = on_problem
        self._outputs: dict[Branch, Any] = {}
        self._guided: dict[int, Tensor] = {}
        # What skipped steps repeat, by its computed step, where taps make it another tensor.
        self._mixed: dict[int, Tensor] = {}
        self._callers: dict[int, frozenset[Branch]] = {}
        self.bytes_per_output: dict[Branch, int] = {}
        self.peak_guided_bytes = 0

    def begin_run(self) -> None:
        """Start counting bytes anew."""
        self.bytes_per_output.clear()
        self.peak_guided_bytes = 0

    @property
    def held_bytes(self) -> int:
        """Bytes of all tensors held now."""
        outputs = sum(tensor_bytes(output) for output in self._outputs.values())
        return outputs + self._guided_bytes

    @property
    def _guided_bytes(self) -> int:
        return sum(v.nbytes for held in (self._guided, self._mixed) for v in held.values())

    def answer(self, step: int, branch: Branch) -> Any:
        """What a skipped call returns, or None if the call has to be computed."""
        schedule = self.schedule
        if not schedule.cached[step]:
            return None
        if branch not in self._outputs or not self._stored(step):
            self._on_problem(f"step: what step {step} predicts from was not stored")
            return None
        return copied(self._outputs[branch])

    def computed(self, step: int, branch: Branch, output: Any) -> None:
        """Keep a computed output if the next step will be skipped."""
        cached = self.schedule.cached
        if step + 1 < len(cached) and cached[step + 1]:
            # A copy, since pipelines may write into what the transformer returned to them.
            kept = copied(output)
            self._outputs[branch] = kept
            self.bytes_per_output[branch] = tensor_bytes(kept)

    def guided(
        self, step: int, velocity: Tensor, answered: frozenset[Branch], computed: frozenset[Branch]
    ) -> Tensor:
        """The velocity that the scheduler is to use instead of the pipeline's own.

        Args:
            step: The step.
            velocity: What the pipeline made of the transformer's outputs.
            answered: Branches whose calls were skipped at this step.
            computed: Branches that ran.
        """
        schedule = self.schedule
        weight = schedule.weight[step]
        if not answered:
            result = self._corrected(step, velocity)
            if schedule.refresh[step]:
                self._store(step, velocity, result, computed)
            return velocity if result is None else result
        source = schedule.anchor[step]
        anchor = self._mixed.get(source, self._guided.get(source))
        base = self._guided.get(schedule.base[step]) if weight else None
        if anchor is None or (weight and base is None) or anchor.shape != velocity.shape:
            self._on_problem(f"step: what was stored for step {step} was lost within it")
            return velocity
        if computed or answered != self._callers[schedule.anchor[step]]:
            # The pipeline calls otherwise from here on, so what is stored serves no later step.
            self._on_problem(f"step: the calls at step {step} are not those that it predicts from")
            self._drop_guided()
            return velocity
        result = predict(anchor, base, weight)
        # A copy, since nothing is known of what the scheduler does with what it is given.
        return (result.clone() if result is anchor else result).to(velocity)

    def _corrected(self, step: int, velocity: Tensor) -> Tensor | None:
        """What a computed step hands on: its own output, corrected with earlier ones.

        None if one of them is not there.
        """
        schedule = self.schedule
        pairs: tuple[tuple[int, float], ...] = ()
        if schedule.taps is not None:
            pairs = schedule.taps[step]
        elif schedule.refresh[step] and schedule.weight[step]:
            pairs = ((schedule.base[step], schedule.weight[step]),)
        if not pairs:
            return velocity
        earlier = [self._guided.get(source) for source, _ in pairs]
        found = [v.to(velocity) for v in earlier if v is not None and v.shape == velocity.shape]
        if len(found) < len(pairs):
            self._on_problem(f"step: what corrects step {step} was not stored")
            return None
        if schedule.taps is None:
            return predict(velocity, found[0], pairs[0][1])
        return mean_velocity(velocity, found, [tap for _, tap in pairs])

    def _store(
        self, step: int, velocity: Tensor, result: Tensor | None, computed: frozenset[Branch]
    ) -> None:
        schedule = self.schedule
        if schedule.last_use[step] > step:
            self._guided[step] = velocity.detach().clone()
        # Where a correction failed no mean is kept, so that the steps that would repeat it are
        # computed instead.
        if result is not None and schedule.last_mixed and schedule.last_mixed[step] > step:
            self._mixed[step] = result.detach().clone()
        if step in self._guided or step in self._mixed:
            self._callers[step] = computed
            self.peak_guided_bytes = max(self.peak_guided_bytes, self._guided_bytes)

    def finish_step(self, step: int) -> None:
        """Free what no step after `step` reads."""
        schedule = self.schedule
        for held, uses in ((self._guided, schedule.last_use), (self._mixed, schedule.last_mixed)):
            for stored in [s for s in held if uses[s] <= step]:
                del held[stored]
        for stored in [s for s in self._callers if s not in self._guided and s not in self._mixed]:
            del self._callers[stored]
        if step + 1 >= len(schedule.cached) or not schedule.cached[step + 1]:
            self._outputs.clear()

    def flush(self, branch: Branch | None = None) -> None:
        """Drop what is held, of one branch or of all; guided outputs belong to all branches."""
        self._drop_guided()
        if branch is None:
            self._outputs.clear()
        else:
            self._outputs.pop(branch, None)

    def _drop_guided(self) -> None:
        self._guided.clear()
        self._mixed.clear()
        self._callers.clear()

    def _stored(self, step: int) -> bool:
        schedule = self.schedule
        anchor = schedule.anchor[step]
        mixed = schedule.taps is not None and bool(schedule.taps[anchor])
        if anchor not in (self._mixed if mixed else self._guided):
            return False
        return not schedule.weight[step] or schedule.base[step] in self._guided
