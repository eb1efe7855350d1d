"""Plain runs of an entry, watched from outside: independent of LayerCache's own taps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from diffusers import ModularPipeline
from torch import Tensor

from layercache.calibration.prompts import batches, noise_seed
from tests.pipelines.entry import Arguments, Entry

SEED = 0


@dataclass
class Observed:
    """What a run handed to its scheduler and got back, by step; and what it returned."""

    velocities: list[Tensor] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)
    output: Tensor | None = None
    calls: int = 0

    @property
    def live(self) -> Tensor:
        """Where most steps of the scheduler moved the latent and the pipeline left it so."""
        left = torch.zeros_like(self.latents[0], dtype=torch.int32)
        for before, made, after in zip(self.latents, self.made, self.latents[1:], strict=False):
            left += (made != before) & (made == after)
        return (2 * left > len(self.latents) - 1) & (torch.stack(self.velocities) != 0).any(dim=0)


def run(entry: Entry, pipe: Any, number: int = 1) -> Tensor:
    """One call of the pipeline, with the noise that calibration gives the prompt.

    Returns:
        Its first output as a tensor.
    """
    call = {**entry.call(), "num_inference_steps": entry.steps}
    batch = batches([entry.prompt(number)], SEED, 1, call)[0]
    arguments: Arguments = dict(batch.arguments)
    # Some pipelines draw from the global generator too.
    torch.manual_seed(noise_seed(batch.ids[0]))
    with torch.no_grad():
        if isinstance(pipe, ModularPipeline):
            output = pipe(**arguments).get("latents")
        else:
            decodes = getattr(pipe, "vae", None) is not None
            arguments |= {"output_type": "pt" if decodes else "latent", "return_dict": False}
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
        seen.velocities.append(model_output.clone())
        seen.latents.append(sample.clone())
        result = original(self, model_output, t, sample, *args, **kw)
        seen.made.append(result[0].clone())
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
