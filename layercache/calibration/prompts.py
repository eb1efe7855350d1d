"""Prompts as pipeline arguments, and an identity for each that does not depend on its position."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layercache.errors import StatsError

Prompt = str | Mapping[str, Any]
_DECIDED = frozenset({"generator", "num_inference_steps", "output_type", "return_dict"})
"""Arguments that calibration sets itself."""


@dataclass(frozen=True)
class Batch:
    """Prompts of one pipeline call: their identities and the call's arguments."""

    ids: tuple[str, ...]
    arguments: dict[str, Any]

    def extent(self) -> tuple[int, int]:
        """What the memory that the batch needs grows with: its prompts, and its longest text."""
        text = self.arguments.get("prompt")
        texts = [text] if isinstance(text, str) else text or [""]
        embeds = self.arguments.get("prompt_embeds")
        tokens = embeds.shape[-2] if isinstance(embeds, Tensor) and embeds.ndim > 1 else 0
        return len(self.ids), max(tokens, *(len(text) for text in texts))


def prompt_id(prompt: Prompt, seed: int, repetition: int = 0) -> str:
    """Digest of a prompt and the run's seed; it also seeds the prompt's starting noise.

    Position and company do not enter, so that however prompts are split over batches, shards and
    machines, each is measured on the same noise.

    Args:
        prompt: Text, or a mapping of pipeline arguments.
        seed: Of the run.
        repetition: How many equal prompts stand before this one; each has noise of its own.

    Raises:
        StatsError: A value in the prompt is none that another process would recognise.
    """
    digest = hashlib.sha256(str(int(seed)).encode())
    _feed(digest, prompt)
    if repetition:
        # What was fed ends with a semicolon, so no other prompt feeds the same bytes.
        digest.update(f"#{int(repetition)}".encode())
    return digest.hexdigest()


def identities_of(prompts: Sequence[Prompt], seed: int) -> tuple[str, ...]:
    """The identity of each prompt of a run; prompts that stand several times are numbered.

    Example:
        >>> one, other = identities_of(["", ""], seed=0)
        >>> one == prompt_id("", 0), other == prompt_id("", 0, repetition=1)
        (True, True)
    """
    seen: Counter[str] = Counter()
    found = []
    for prompt in prompts:
        first = prompt_id(prompt, seed)
        count = seen[first]
        found.append(prompt_id(prompt, seed, count) if count else first)
        seen[first] += 1
    return tuple(found)


def noise_seed(identity: str) -> int:
    """The seed of the starting noise that belongs to a prompt's identity."""
    return int(identity[:15], 16)


def arguments_digests(call_kwargs: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the pipeline's arguments that a setting does not hold, such as embeddings.

    Objects such as callbacks have no identity that survives the process, and do not enter.

    Args:
        call_kwargs: Pipeline arguments of every call.
        named: The setting.
    """
    found = {}
    held = set(named) | set(named.get("call", {}))
    for name in sorted(set(call_kwargs) - held - _DECIDED):
        digest = hashlib.sha256()
        try:
            _feed(digest, call_kwargs[name])
        except StatsError:
            continue
        found[name] = digest.hexdigest()[:16]
    return found


def batches(
    prompts: Sequence[Prompt], seed: int, size: int, call_kwargs: Mapping[str, Any]
) -> list[Batch]:
    """Split prompts into pipeline calls: strings `size` at a time, mappings one by one.

    `call_kwargs` go to every call; a `negative_prompt` string among them is repeated for a batch. A
    prompt may stand several times, each time with noise of its own.

    Raises:
        StatsError: There are no prompts, one is neither a string nor a mapping, or one asks for
            another number of steps.
    """
    listed = hasattr(prompts, "__getitem__") and not isinstance(prompts, str | bytes | Mapping)
    if not listed or not len(prompts):
        raise StatsError("prompts must be a non-empty sequence of strings or mappings")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str | Mapping):
            raise StatsError(
                f"prompt {index} is {prompt!r}; give a string or a mapping of pipeline arguments"
            )
    identities = identities_of(prompts, seed)
    result = []
    start = 0
    while start < len(prompts):
        stop = start + 1
        while (
            stop < min(start + size, len(prompts))
            and isinstance(prompts[start], str)
            and isinstance(prompts[stop], str)
        ):
            stop += 1
        result.append(_batch(prompts[start:stop], identities[start:stop], call_kwargs))
        start = stop
    return result


def _batch(
    prompts: Sequence[Prompt], identities: tuple[str, ...], call_kwargs: Mapping[str, Any]
) -> Batch:
    generators = [torch.Generator().manual_seed(noise_seed(i)) for i in identities]
    arguments: dict[str, Any] = dict(call_kwargs)
    first = prompts[0]
    if isinstance(first, str):
        arguments["prompt"] = list(prompts) if len(prompts) > 1 else first
        negative = arguments.get("negative_prompt")
        if isinstance(negative, str) and len(prompts) > 1:
            arguments["negative_prompt"] = [negative] * len(prompts)
    else:
        arguments.update(first)
        steps = call_kwargs.get("num_inference_steps")
        if arguments.get("num_inference_steps") != steps:
            raise StatsError(
                f"a prompt asks for num_inference_steps={arguments['num_inference_steps']} in a "
                f"run of {steps} steps: leave it out of the prompt"
            )
    arguments["generator"] = generators if len(generators) > 1 else generators[0]
    return Batch(identities, arguments)


def _feed(digest: Any, value: Any) -> None:
    """Feed a nested value of strings, numbers and tensors, each marked by its kind."""
    if isinstance(value, Mapping):
        digest.update(b"{")
        for name in sorted(value, key=str):
            digest.update(str(name).encode(errors="backslashreplace") + b"=")
            _feed(digest, value[name])
    elif isinstance(value, list | tuple):
        digest.update(b"[")
        for item in value:
            _feed(digest, item)
    elif isinstance(value, Tensor):
        array = value.detach().cpu().float().contiguous().numpy()
        digest.update(f"tensor{array.shape}".encode() + array.tobytes())
    elif value is None or isinstance(value, bool | int | float | str):
        digest.update(json.dumps(value).encode())
    elif hasattr(value, "__array_interface__") and not np.asarray(value).dtype.hasobject:
        # NumPy's arrays and PIL's images.
        array = np.ascontiguousarray(value)
        digest.update(f"array{array.dtype}{array.shape}".encode() + array.tobytes())
    else:
        raise StatsError(
            f"a prompt holds a {type(value).__name__}, which another process would not recognise: "
            "give text, numbers, tensors, arrays or images"
        )
    digest.update(b";")
