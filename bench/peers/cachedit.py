"""cache-dit 1.5.3 as it is: DBCache, DBCache with TaylorSeer, and its static step masks.

Source: https://github.com/vipshop/cache-dit. The first Fn blocks run at every step; while their
residual changes less than a threshold, the others are replaced by their last residual, or by its
Taylor extrapolation. A static mask says instead which steps are computed.

It is an optional extra (`pip install 'layercache-flow[peers]'`). It patches the pipeline's class
for as long as it is attached.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from layercache.errors import LayerCacheError


@dataclass(frozen=True)
class CacheDit:
    """One setting of cache-dit.

    Attributes:
        name: As it stands in the table.
        threshold: Largest relative change of the first blocks' residual that still caches.
        first_blocks: Fn, blocks computed at every step.
        warm_up: Steps at the start that are always computed.
        taylor_order: 0 repeats the last residual; above, it is extrapolated.
        mask: Which steps to compute, instead of the threshold.
        branches: Transformer calls a step: 2 where guidance calls it twice.
    """

    name: str
    threshold: float = 0.08
    first_blocks: int = 8
    warm_up: int = 8
    taylor_order: int = 0
    mask: tuple[bool, ...] | None = None
    branches: int = 2
    compute_share: float = 1.0
    predicted_speedup: float | None = None
    call_changes: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def attach(self, pipe: Any) -> Iterator[None]:
        """Enable cache-dit on the pipeline, and remove every trace of it.

        Raises:
            LayerCacheError: cache-dit is not installed.
        """
        cache_dit = load_cache_dit()
        transformer = pipe.transformer
        had_own = "forward" in vars(transformer)
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=self.first_blocks,
            residual_diff_threshold=self.threshold,
            max_warmup_steps=self.warm_up,
            enable_separate_cfg=self.branches > 1,
            steps_computation_mask=None if self.mask is None else [int(m) for m in self.mask],
            steps_computation_policy="dynamic" if self.mask is None else "static",
        )
        calibrator = None
        if self.taylor_order:
            calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=self.taylor_order)
        cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
        try:
            yield
        finally:
            cache_dit.disable_cache(pipe)
            if not had_own:
                vars(transformer).pop("forward", None)


def load_cache_dit() -> Any:
    """The package, its log quiet.

    Raises:
        LayerCacheError: It is not installed, or cannot be imported.
    """
    try:
        cache_dit: Any = importlib.import_module("cache_dit")
    except Exception as error:  # It imports compiled and distributed parts that may fail anyhow.
        raise LayerCacheError(
            f"cache-dit cannot be imported ({type(error).__name__}: {error}); "
            "pip install 'layercache-flow[peers]'"
        ) from error
    for name in list(logging.root.manager.loggerDict):
        if name.lower().replace("-", "_").startswith("cache_dit"):
            logging.getLogger(name).setLevel(logging.ERROR)
    return cache_dit


def cache_dit_version() -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version("cache-dit")
    except importlib.metadata.PackageNotFoundError:
        return None


def preset_masks(steps: int) -> dict[str, tuple[bool, ...]]:
    """The masks that cache-dit ships, for this number of steps, by its names."""
    cache_dit = load_cache_dit()
    masks: Sequence[tuple[str, Any]] = [
        (policy, cache_dit.steps_mask(total_steps=steps, mask_policy=policy))
        for policy in ("slow", "medium", "fast", "ultra")
    ]
    return {policy: tuple(bool(step) for step in mask) for policy, mask in masks}
