"""What an entry of the zoo of pipelines is, and the small parts that all of them are made of.

An entry is one of diffusers' own pipeline classes around tiny random models, in one variant, with
what it takes to call it. Text encoders are replaced by embeddings wherever the pipeline allows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tests.models import zoo

TEXT = 5
Arguments = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Entry:
    """One pipeline class in one variant.

    Args:
        pipeline: Name of the class.
        variant: What is varied, such as "text-to-image" or "inpaint".
        build: Makes the pipeline; equal for equal calls.
        prompt: Arguments of one prompt, for a seed that tells prompts apart.
        call: Arguments of every call, without the number of steps.
        steps: Steps asked for.
        patched: Dotted names in diffusers that are replaced while the entry runs, such as a fixed
            size of a megapixel.
        component: Attribute of the pipeline that holds the transformer.
        partial: A part of the latent is the pipeline's own to make, such as an inpainted
            background or a first frame.
        negated: The model's output points against the velocity.
        grouped: Blocks can be grouped: an adapter knows the model, and the scheduler calls it once
            a step.
        passes: How often the scheduler calls the model for a step.
        refused: Why calibration has to refuse this entry; empty where it has not.
        note: What is different here from the ordinary case, for the table.
    """

    pipeline: str
    variant: str
    build: Callable[[], Any]
    prompt: Callable[[int], Arguments]
    call: Callable[[], Arguments]
    steps: int = 6
    patched: Mapping[str, Any] = field(default_factory=dict)
    component: str = "transformer"
    partial: bool = False
    negated: bool = False
    grouped: bool = True
    passes: int = 1
    refused: str = ""
    note: str = ""

    @property
    def name(self) -> str:
        """Unique in the zoo."""
        return f"{self.pipeline}: {self.variant}"

    def patches(self) -> Any:
        """A context in which the entry's replacements hold."""
        return _Patches(self.patched)


class _Patches:
    def __init__(self, patched: Mapping[str, Any]) -> None:
        self._patches = [mock.patch(name, value) for name, value in patched.items()]

    def __enter__(self) -> None:
        for patch in self._patches:
            patch.start()

    def __exit__(self, *_: Any) -> None:
        for patch in reversed(self._patches):
            patch.stop()


def assemble(pipeline: str, **components: Any) -> Any:
    """A pipeline, quiet; every component that is not given is None."""
    cls = getattr(diffusers, pipeline)
    parameters = inspect.signature(cls.__init__).parameters.values()
    required = [p.name for p in parameters if p.name != "self" and p.default is p.empty]
    pipe = cls(**{name: None for name in required} | components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def transformer(name: str, seed: int = 0, **changes: Any) -> Any:
    """The tiny transformer of a class; `changes` go to its configuration."""
    return zoo.build(name, seed, **changes)[0]


def embeds(*shape: int, seed: int = 0) -> Tensor:
    """Seeded noise (1, ...)."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def ones(*shape: int) -> Tensor:
    """A mask (1, ...) that hides nothing, of integers."""
    return torch.ones(1, *shape, dtype=torch.long)


def picture(size: int = 32, seed: int = 7) -> Tensor:
    """A smooth random image (1, 3, H, W) in [0, 1]."""
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")


def pil(size: int = 32, seed: int = 7) -> Image.Image:
    """The same as a PIL image."""
    array = (picture(size, seed)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    return Image.fromarray(array)


def mask(size: int = 32) -> Tensor:
    """A mask (1, 1, H, W): the right half is to be painted."""
    found = torch.zeros(1, 1, size, size)
    found[..., size // 2 :] = 1.0
    return found


def given(**values: Any) -> Callable[[], Arguments]:
    """Arguments of a call; values that are functions are made anew for every call."""
    return lambda: {name: v() if callable(v) else v for name, v in values.items()}


def unfrozen(module: Any) -> Any:
    """The module for inference, with what diffusers starts at zero made random."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point() and parameter.abs().max() == 0:
                parameter.normal_(std=0.1)
    return module.eval()


def euler(**changes: Any) -> Any:
    """Flow-matching Euler at shift 3."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | changes)


def unipc(**changes: Any) -> Any:
    """UniPC as flow-matching pipelines use it."""
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return diffusers.UniPCMultistepScheduler(**options | changes)


def dpm(**changes: Any) -> Any:
    """DPM-Solver++ 2M as flow-matching pipelines use it."""
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return diffusers.DPMSolverMultistepScheduler(**options | changes)


def heun(**changes: Any) -> Any:
    """Flow-matching Heun: two transformer calls a step."""
    return diffusers.FlowMatchHeunDiscreteScheduler(**{"shift": 3.0} | changes)
