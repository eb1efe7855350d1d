"""Plain runs of an entry, watched from outside: independent of LayerCache's own taps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from layercache.calibration.prompts import batches
from tests.pipelines.entry import Arguments, Entry

SEED = 0


@dataclass
class Observed:
    """What a run handed to its scheduler and got back, by step; and what it returned."""

    velocities: dict[int, Tensor] = field(default_factory=dict)
    latents: dict[int, Tensor] = field(default_factory=dict)
    final: Tensor | None = None
    output: Tensor | None = None
    calls: int = 0


def arguments_of(entry: Entry, number: int = 1) -> Arguments:
    """Arguments of the entry's prompt, with the noise that calibration gives it."""
    call = {**entry.call(), "num_inference_steps": entry.steps}
    found: Arguments = dict(batches([entry.prompt(number)], SEED, 1, call)[0].arguments)
    return found


def run(entry: Entry, pipe: Any, number: int = 1) -> Tensor:
    """One call of the pipeline; its first output as a tensor."""
    arguments = arguments_of(entry, number)
    decodes = getattr(pipe, "vae", None) is not None
    arguments |= {"output_type": "pt" if decodes else "latent", "return_dict": False}
    torch.manual_seed(SEED)
    with torch.no_grad():
        output = pipe(**arguments)[0]
    return output if isinstance(output, Tensor) else torch.stack(list(output))


@contextmanager
def watched(entry: Entry, pipe: Any) -> Iterator[Observed]:
    """Watch the pipeline's scheduler, by its class, and the transformer's calls."""
    seen, scheduler = Observed(), pipe.scheduler
    original = type(scheduler).step

    def step(self: Any, model_output: Tensor, t: Any, sample: Tensor, *args: Any, **kw: Any) -> Any:
        if self is not scheduler:
            return original(self, model_output, t, sample, *args, **kw)
        index = self.step_index if self.step_index is not None else (self.begin_index or 0)
        seen.velocities[index], seen.latents[index] = model_output.clone(), sample.clone()
        result = original(self, model_output, t, sample, *args, **kw)
        seen.final = result[0].clone()
        return result

    def count(*_: Any) -> None:
        seen.calls += 1

    hook = getattr(pipe, entry.component).register_forward_pre_hook(count)
    try:
        with mock.patch.object(type(scheduler), "step", step):
            yield seen
    finally:
        hook.remove()


def observe(entry: Entry, pipe: Any, number: int = 1) -> Observed:
    """A plain run, watched."""
    with watched(entry, pipe) as seen:
        seen.output = run(entry, pipe, number)
    return seen
