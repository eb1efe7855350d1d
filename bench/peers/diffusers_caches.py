"""The caches that ship with diffusers, run as they are through `transformer.enable_cache`.

- First Block Cache (ParaAttention; after TeaCache, Liu et al., arXiv 2411.19108): the first block
  runs at every step, and the others are skipped while its residual changes less than a threshold.
- MagCache (Ma et al., arXiv 2506.09045): steps are skipped by a curve of residual magnitudes that
  is measured once; diffusers prints that curve, and `mag_ratios` reads it from there.
- TaylorSeer (Liu et al., arXiv 2503.06923): modules are computed at a fixed interval and predicted
  in between by finite differences in the step number.

What diffusers decides by norms over a batch is decided for the whole batch at once, as served.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig

from layercache.calibration.prompts import Batch
from layercache.errors import LayerCacheError
from layercache.models.pipelines import run_pipeline

TAYLOR_MODULES: Mapping[str, Mapping[str, Any]] = {
    "lite": {"use_lite_mode": True},
    "blocks": {
        "cache_identifiers": [
            r"^transformer_blocks\.[0-9]+\.attn",
            r"^transformer_blocks\.[0-9]+\.(img|txt)_mlp",
        ]
    },
}
"""What TaylorSeer predicts: the last projection alone, or every attention and MLP as published.

Its default, attention alone, leaves the MLPs to be computed at every step.
"""


@dataclass(frozen=True)
class DiffusersCache:
    """One configuration of a diffusers cache, attached afresh for every generation."""

    config: Any
    name: str
    compute_share: float = 1.0
    predicted_speedup: float | None = None
    call_changes: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def attach(self, pipe: Any) -> Iterator[None]:
        """Enable the cache, and disable it again."""
        pipe.transformer.enable_cache(self.config)
        try:
            yield
        finally:
            pipe.transformer.disable_cache()


def first_block_cache(threshold: float) -> DiffusersCache:
    """First Block Cache at one threshold; at a negative one it computes everything."""
    return DiffusersCache(FirstBlockCacheConfig(threshold=threshold), "first-block-cache")


def mag_cache(
    ratios: Sequence[float], threshold: float, max_skip: int, retention: float
) -> DiffusersCache:
    """MagCache with the magnitude curve of this model and number of steps."""
    config = MagCacheConfig(
        threshold=threshold,
        max_skip_steps=max_skip,
        retention_ratio=retention,
        num_inference_steps=len(ratios),
        mag_ratios=list(ratios),
    )
    return DiffusersCache(config, "magcache")


def taylor_seer(modules: str, interval: int, order: int, warm_up: int = 3) -> DiffusersCache:
    """TaylorSeer in float32 on the modules named in `TAYLOR_MODULES`."""
    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=warm_up,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        **TAYLOR_MODULES[modules],
    )
    return DiffusersCache(config, "taylorseer")


def mag_ratios(pipe: Any, batch: Batch, steps: int) -> tuple[float, ...]:
    """The magnitude curve (T,) that diffusers' own calibration prints, averaged over branches.

    Raises:
        LayerCacheError: diffusers printed no curve of this length.
    """
    config = MagCacheConfig(calibrate=True, num_inference_steps=steps)
    printed = io.StringIO()
    with (
        DiffusersCache(config, "magcache").attach(pipe),
        torch.no_grad(),
        contextlib.redirect_stdout(printed),
    ):
        run_pipeline(pipe, batch.arguments)
    curves = [
        json.loads(line)
        for line in printed.getvalue().splitlines()
        if line[:1] == "[" and line[:10] != "[MagCache]"
    ]
    if not curves or any(len(curve) != steps for curve in curves):
        raise LayerCacheError(
            f"diffusers' MagCache calibration printed {len(curves)} curves, none or not all of "
            f"{steps} steps; it is skipped"
        )
    return tuple(np.mean(curves, axis=0).tolist())
