"""SeaCache, diffusers' own, on an image model that its pipeline does not prepare for it.

Source: "SeaCache", arXiv 2602.18993: the transformer's blocks are replaced by their last residual,
or its extrapolation, while the latent, filtered by the signal that its noise level leaves visible,
changes less than a threshold in all.

diffusers 0.42 feeds it for Cosmos 3 and Wan only. `QwenImagePipeline` enters `cache_context`
without a step or a sigma, and then SeaCache computes everything. Its generic path asks for two
things, which are given here: the context's fields, read from the scheduler, and the latents as
pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from diffusers import SeaCacheConfig
from torch import Tensor

from layercache.models.stepping import step_index


@dataclass(frozen=True)
class SeaCache:
    """One setting of SeaCache.

    Attributes:
        threshold: Accumulated relative change that is allowed before a step is computed.
        order: 0 repeats the last residual, 1 extrapolates from the last two.
        max_cached: Most steps in a row that are not computed; 0 is no limit.
    """

    threshold: float
    order: int = 1
    max_cached: int = 2
    name: str = "seacache"
    compute_share: float = 1.0
    predicted_speedup: float | None = None
    call_changes: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def attach(self, pipe: Any) -> Iterator[None]:
        """Enable SeaCache and complete the contexts that the pipeline enters."""
        transformer, scheduler = pipe.transformer, pipe.scheduler
        plain = transformer.cache_context

        def cache_context(name: str, **given: Any) -> AbstractContextManager[None]:
            index = step_index(scheduler)
            known = {
                "step_index": index,
                "sigma": float(scheduler.sigmas[index]),
                "num_inference_steps": len(scheduler.sigmas) - 1,
            }
            context: AbstractContextManager[None] = plain(name, **(known | given))
            return context

        config = SeaCacheConfig(
            threshold=self.threshold,
            residual_order=self.order,
            max_consecutive_cached=self.max_cached,
            raw_vision_callback=packed_latents,
        )
        transformer.enable_cache(config)
        transformer.cache_context = cache_context
        try:
            yield
        finally:
            del transformer.cache_context
            transformer.disable_cache()


def packed_latents(
    module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Tensor] | None:
    """Each latent of a Qwen-Image call as (C, 1, H, W), its 2 x 2 patches unpacked."""
    hidden = kwargs.get("hidden_states", args[0] if args else None)
    shapes = kwargs.get("img_shapes")
    if hidden is None or not shapes:
        return None
    first = shapes[0][0] if isinstance(shapes[0], list) else shapes[0]
    _, height, width = first
    pictures = hidden.unflatten(1, (height, width)).unflatten(-1, (-1, 2, 2))
    pictures = pictures.permute(0, 3, 1, 4, 2, 5).flatten(2, 3).flatten(3, 4)
    return list(pictures.unsqueeze(2).unbind(0))
