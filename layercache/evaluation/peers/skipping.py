"""The runner that whole-step methods share: skip transformer calls, replace the guided output.

It patches two attributes of two instances, `transformer.forward` and `scheduler.step`, and takes
both away again. It is written apart from `layercache.runtime`, so that a fault there cannot lower a
peer's figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from layercache.errors import ModelMismatchError
from layercache.models.patching import wrap_method
from layercache.models.stepping import StepFunction, step_index, tapped_step


@contextmanager
def skip_steps(
    pipe: Any, fresh: Sequence[bool], new_run: Callable[[], StepFunction]
) -> Iterator[None]:
    """Run the transformer only at fresh steps; let a function of the method's own decide the rest.

    At a step that is not fresh, every transformer call returns the last output of the same call of
    the step (the pipeline's guidance thus repeats its last result), and what the scheduler gets is
    up to the method.

    Args:
        pipe: A pipeline with `transformer` and `scheduler`.
        fresh: (T,) whether the transformer runs at each step; the first must be.
        new_run: Called at the start of each generation; returns the method's function of (step
            index, guided output, sample before the step), called at every step in order.

    Raises:
        ModelMismatchError: A run has another number of steps than `fresh`.
        ValueError: The first step is not fresh.
    """
    if not fresh or not fresh[0]:
        raise ValueError("the first step must be fresh: there is nothing to reuse before it")
    transformer, scheduler = pipe.transformer, pipe.scheduler
    outputs: list[Any] = []
    call = 0
    advance = new_run()

    def forward(compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal call
        number, call = call, call + 1
        if fresh[step_index(scheduler)]:
            output = compute(*args, **kwargs)
            outputs[number:] = [output]
        return outputs[number]

    def on_step(index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        nonlocal advance, call
        call = 0
        if index == 0:
            if len(scheduler.sigmas) - 1 != len(fresh):
                raise ModelMismatchError(
                    f"the schedule is for {len(fresh)} steps and the pipeline takes "
                    f"{len(scheduler.sigmas) - 1}: set num_inference_steps={len(fresh)}"
                )
            advance = new_run()
        return advance(index, velocity, sample)

    restore = wrap_method(transformer, "forward", forward)
    try:
        with tapped_step(scheduler, on_step):
            yield
    finally:
        restore()
