"""The trained reference model as a diffusers pipeline, ready to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

from layercache.reference._scenes import RESOLUTION
from layercache.reference._text import WordEncoder, WordTokenizer
from layercache.reference._vae import PixelUnshuffleVAE

WEIGHTS = Path(__file__).parent / "weights"
STEPS = 50
SHIFT = 3.0
GUIDANCE = 4.0


def load_pipeline(
    weights: Path | str = WEIGHTS, dtype: torch.dtype = torch.float32
) -> QwenImagePipeline:
    """Load the shipped reference model: 32 blocks of width 64, trained on procedural scenes.

    Example:
        >>> from layercache.reference import call_arguments, load_pipeline
        >>> pipe = load_pipeline()
        >>> image = pipe("a large red circle", **call_arguments(seed=0)).images[0]
        >>> image.size
        (32, 32)
    """
    folder = Path(weights)
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=PixelUnshuffleVAE(),
        text_encoder=WordEncoder.from_pretrained(folder / "text_encoder", torch_dtype=dtype),
        tokenizer=WordTokenizer(),
        transformer=QwenImageTransformer2DModel.from_pretrained(
            folder / "transformer", torch_dtype=dtype
        ),
    )
    # diffusers wraps prompts in a chat template and drops its first 34 tokens; there is none here.
    pipe.prompt_template_encode = "{}"
    pipe.prompt_template_encode_start_idx = 0
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_arguments(seed: int | list[int] = 0, **changes: Any) -> dict[str, Any]:
    """The arguments that the reference setting calls the pipeline with: 50 steps, guidance 4.

    `seed` may be a list, one for each prompt of a batch.
    """
    seeds = seed if isinstance(seed, list) else [seed]
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    arguments: dict[str, Any] = {
        "negative_prompt": "" if len(seeds) == 1 else [""] * len(seeds),
        "true_cfg_scale": GUIDANCE,
        "num_inference_steps": STEPS,
        "height": RESOLUTION,
        "width": RESOLUTION,
        "generator": generators[0] if len(generators) == 1 else generators,
    }
    return arguments | changes
