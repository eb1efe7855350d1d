"""The options that name a pipeline and how it is loaded and called."""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from logging import getLogger
from pathlib import Path
from typing import Any

import click

from layercache.cli._options import FOLDER, REFERENCE, log, parse_json_object, progress
from layercache.errors import LayerCacheError
from layercache.plan import Plan

DTYPES = ("float32", "bfloat16", "float16")
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_MOST_HEADER = 100 * 2**20
_DECIDED = {
    "prompt": "prompts come from --prompts FILE",
    "generator": "the noise follows from --seed and the prompt",
    "output_type": "what is compared is decided by the command",
    "return_dict": "what is compared is decided by the command",
}
"""Arguments of a pipeline's call that are not the user's to give, and what says them instead."""
_KINDS: dict[type, set[str]] = {
    bool: {"bool"},
    int: {"int", "float"},
    float: {"int", "float"},
    str: {"str"},
    list: {"list", "tuple", "sequence"},
    dict: {"dict", "mapping"},
}
"""Words of an annotation that a JSON value satisfies."""
_PLAIN = {"bool", "int", "float", "str", "dict", "mapping"}


@dataclass(frozen=True)
class Model:
    """What was asked for on the command line."""

    name: str
    weights: Path | None
    device: str | None
    dtype: str | None
    offload: str | None
    variant: str | None
    revision: str | None
    lora: tuple[str, ...]
    scheduler: str | None
    call: Mapping[str, Any]

    @property
    def is_reference(self) -> bool:
        """Whether it is the model that ships with the package."""
        return self.name == REFERENCE

    def load(self, device: str | None = None) -> Any:
        """The pipeline, on its device.

        Args:
            device: Where to, if nothing was asked for.
        """
        place = self._device(device)
        scheduler = None if self.scheduler is None else _scheduler_class(self.scheduler)
        pipe = self._reference() if self.is_reference else self._pretrained(place)
        if scheduler is not None:
            pipe.scheduler = _in_place_of(pipe.scheduler, scheduler)
        for name in self.lora:
            _load_lora(pipe, name)
        if self.is_reference:
            log(f"the reference model on {place}")
        if self.offload == "model":
            pipe.enable_model_cpu_offload(device=place)
        elif self.offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=place)
        elif place != "cpu":
            pipe.to(place)
        return pipe

    def under(self, plan: Plan, prompt: str) -> tuple[Any, dict[str, Any]]:
        """The pipeline, and the arguments of its call, once a run has begun under a plan.

        Raises:
            ModelMismatchError: The plan is for another model or another run.
        """
        from layercache.runtime import check_run

        pipe = self.load()
        arguments = self.arguments(pipe, plan)
        check_run(pipe, plan, {"prompt": prompt} | arguments)
        return pipe, arguments

    def arguments(self, pipe: Any, plan: Plan | None = None) -> dict[str, Any]:
        """Of the pipeline's call: those of the plan, and `--call` over them."""
        arguments: dict[str, Any] = {}
        if self.is_reference:
            from layercache.reference import call_arguments

            arguments = call_arguments()
            del arguments["generator"], arguments["num_inference_steps"]
        if plan is not None:
            arguments |= {**plan.setting.get("call", {}), "num_inference_steps": plan.num_steps}
        _check_call(pipe, self.call)
        return arguments | dict(self.call)

    def _device(self, default: str | None) -> str:
        import torch

        if self.device is None:
            if default is not None:
                return default
            if torch.cuda.is_available():
                return "cuda"
            return "mps" if torch.backends.mps.is_available() else "cpu"
        try:
            kind = torch.device(self.device).type
        except RuntimeError as error:
            raise click.UsageError(f"--device {self.device!r} is no device of torch") from error
        there = {
            "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
            "meta": False,
        }  # fmt: skip
        if not there.get(kind, True):
            raise click.UsageError(
                f"--device {self.device}: this torch ({torch.__version__}) finds none; leave the "
                "option out to run on what is there"
            )
        return self.device

    def _reference(self) -> Any:
        import torch

        from layercache.reference import load_pipeline

        dtype = getattr(torch, self.dtype or "float32")
        return (
            load_pipeline(self.weights, dtype=dtype) if self.weights else load_pipeline(dtype=dtype)
        )

    def _pretrained(self, device: str) -> Any:
        import torch
        from diffusers import DiffusionPipeline
        from diffusers.utils import logging
        from transformers.utils import logging as weights_logging

        # Said of every pipeline that could take images, and nothing of ours needs torchvision.
        getLogger("transformers.utils.import_utils").addFilter(
            lambda record: "requires torchvision" not in record.getMessage()
        )
        if not progress():
            logging.disable_progress_bar()
            weights_logging.disable_progress_bar()
        options = {
            key: value
            for key, value in (("variant", self.variant), ("revision", self.revision))
            if value is not None
        }
        try:
            folder = self.name
            if Path(folder).is_file():
                raise OSError(
                    "it is one file; a checkpoint of one file becomes a folder by "
                    "PIPELINE.from_single_file(FILE).save_pretrained(FOLDER) of diffusers"
                )
            if not Path(folder).is_dir():
                if folder.count("/") != 1 or folder.startswith((".", "/", "~")):
                    raise OSError("there is no such folder")
                folder = DiffusionPipeline.download(folder, **options)
            dtype = self.dtype or _dtype_for(Path(folder), device)
            pipe = DiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, dtype), **options)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise LayerCacheError(
                f"cannot load the pipeline {self.name!r} ({error}); give a folder that diffusers "
                f"saved (with a model_index.json), a model id of the hub, or {REFERENCE!r}"
            ) from error
        log(f"{type(pipe).__name__} in {dtype} on {device}")
        return pipe


def model_options(default: str | None = REFERENCE) -> Callable[[Callable[..., Any]], Any]:
    """Add MODEL and its options; the command gets them as one `model`.

    MODEL may also be given as `--pipe`.
    """

    def decorate(command: Callable[..., Any]) -> Any:
        @functools.wraps(command)
        def wrapped(*args: Any, pipe_name: str | None, **kwargs: Any) -> Any:
            given = {f.name: kwargs.pop(f.name) for f in fields(Model) if f.name in kwargs}
            named = given.pop("name")
            if named and pipe_name and named != pipe_name:
                raise click.UsageError(f"MODEL is {named!r} and --pipe {pipe_name!r}: name one")
            model = Model(name=named or pipe_name or REFERENCE, **given)
            return command(*args, model=model, **kwargs)

        found: Any = wrapped
        for option in reversed(_OPTIONS):
            found = option(found)
        return found

    return decorate


_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.argument("name", metavar="[MODEL]", required=False),
    click.option("--pipe", "pipe_name", hidden=True, help="The same as MODEL."),
    click.option("--weights", type=FOLDER, hidden=True, help="Other reference weights."),
    click.option(
        "--device", help="Such as cuda:1.  [default: cuda or mps if there is one, or cpu]"
    ),
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        help="[default: that of the model's files; on a CPU float32]",
    ),
    click.option(
        "--offload",
        type=click.Choice(["model", "sequential"]),
        help="Keep what is not running on the CPU: whole models, or layer by layer.",
    ),
    click.option("--variant", help="Of the files, such as fp16."),
    click.option("--revision", help="Branch, tag or commit of the model's repository."),
    click.option("--lora", multiple=True, help="LoRA weights to load. Any number of times."),
    click.option(
        "--scheduler", help="Class of diffusers to run with, such as UniPCMultistepScheduler."
    ),
    click.option(
        "--call",
        callback=parse_json_object,
        default="{}",
        help="Pipeline arguments as a JSON object, such as '{\"height\": 512}'.",
    ),
)


def _dtype_for(folder: Path, device: str) -> str:
    """The dtype of the largest weights; on a CPU float32, where half precision is slow."""
    if device == "cpu":
        return "float32"
    files = sorted(folder.glob("transformer*/*.safetensors")) or sorted(
        folder.glob("unet/*.safetensors")
    )
    for file in files:
        with open(file, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(size, _MOST_HEADER)))
        kinds = {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
        for stored in ("BF16", "F16", "F32"):
            if stored in kinds:
                return _STORED[stored]
    return "float32"


def _scheduler_class(name: str) -> Any:
    import diffusers

    known = [found for found in dir(diffusers) if found.endswith("Scheduler")]
    if name not in known or not hasattr(getattr(diffusers, name), "from_config"):
        raise click.UsageError(
            f"--scheduler {name!r} is no scheduler of diffusers; {_nearest(name, known, 'it has')}"
        )
    return getattr(diffusers, name)


def _in_place_of(current: Any, kind: Any) -> Any:
    """A scheduler of a class, with the configuration of the model's own."""
    # Samplers that were made for other models have to be told that this one predicts velocities.
    known_options = inspect.signature(kind).parameters
    flow: dict[str, Any] = {}
    if "use_flow_sigmas" in known_options:
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        flow["flow_shift"] = current.config.get("shift", current.config.get("flow_shift", 1.0))
    return kind.from_config(current.config, **flow)


def _load_lora(pipe: Any, name: str) -> None:
    if not hasattr(pipe, "load_lora_weights"):
        raise click.UsageError(f"--lora: {type(pipe).__name__} takes no LoRA")
    try:
        pipe.load_lora_weights(name)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise LayerCacheError(f"cannot load the LoRA {name!r} ({error})") from error


def _check_call(pipe: Any, call: Mapping[str, Any]) -> None:
    """Refuse arguments that the pipeline's call does not have, or that are not the user's to give.

    Raises:
        click.UsageError: Names the argument, and what there is.
    """
    for key in call:
        if key in _DECIDED:
            raise click.UsageError(f"--call: leave {key!r} out; {_DECIDED[key]}")
    parameters = inspect.signature(type(pipe).__call__).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for key, value in call.items():
        if key not in parameters:
            raise click.UsageError(
                f"--call: {type(pipe).__name__} takes no {key!r}; "
                + _nearest(key, [name for name in parameters if name != "self"], "it has")
            )
        if not _may_be(value, parameters[key].annotation):
            raise click.UsageError(
                f"--call: {key!r} of {type(pipe).__name__} cannot be {json.dumps(value)}; it takes "
                f"{_written(parameters[key].annotation)}. What JSON cannot hold is given in Python"
            )


def _may_be(value: Any, annotation: Any) -> bool:
    """Whether a JSON value is of an annotated kind, as far as that can be told from its text."""
    words = set(re.findall(r"[a-z]+", _written(annotation).lower()))
    if value is None or words & {"any", "empty"}:
        return True
    if "callable" in words or not words & _PLAIN:
        return False
    return bool(words & _KINDS[type(value)])


def _written(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _nearest(name: str, known: list[str], has: str) -> str:
    scores = {each: _alike(name, each) for each in known}
    near = sorted((each for each in known if scores[each] >= 0.6), key=lambda each: -scores[each])
    return f"{has} {', '.join(near[:4] or [*known[:3], f'{max(len(known) - 3, 0)} others'])}"


def _alike(name: str, known: str) -> float:
    """How well a name fits a part of a known one, at most 1."""
    name, known = name.lower(), known.lower().removesuffix("scheduler")
    starts = range(max(len(known) - len(name), 0) + 1)
    return max(
        difflib.SequenceMatcher(None, name, known[start : start + len(name)]).ratio()
        for start in starts
    )
