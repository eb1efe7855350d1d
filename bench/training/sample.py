"""Draw samples of held-out captions on one sheet.

    python -m bench.training.sample --model FOLDER --out sheet.png

The captions name everything (picture, size, place, background) and are written beside the sheet as
`sheet.txt`, so that a person can first name the pictures, then look.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image

from bench.training.autoencoder import held_out_scenes
from bench.training.export import load_run
from bench.training.scenes import RESOLUTION, describe, training_scene
from bench.training.state import read_names
from bench.training.text import CAPTION_TOKENS

STEPS = 28
GUIDANCE = 3.0


def load_model(folder: Path) -> FluxPipeline:
    """An exported pipeline, or the averaged weights of a run that is still going on."""
    if (folder / "model_index.json").exists():
        pipe = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    else:
        pipe = load_run(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_arguments(seeds: list[int], **changes: Any) -> dict[str, Any]:
    """The setting of the model: 28 steps, true guidance 3, 64x64 pixels; a seed a prompt."""
    arguments: dict[str, Any] = {
        "negative_prompt": [""] * len(seeds),
        "true_cfg_scale": GUIDANCE,
        "num_inference_steps": STEPS,
        "height": RESOLUTION,
        "width": RESOLUTION,
        "max_sequence_length": CAPTION_TOKENS,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
    }
    return arguments | changes


def held_out_captions(names: list[str], count: int, seed: int) -> list[str]:
    """Captions of combinations that were never trained on; everything is named."""
    rng = np.random.default_rng(seed)
    return [describe(scene, rng, openness=0.0) for scene in held_out_scenes(names, seed, count)]


def training_captions(names: list[str], count: int, seed: int) -> list[str]:
    """Captions like those that were trained on, facts left open: for calibration."""
    rng = np.random.default_rng(seed)
    return [describe(training_scene(rng, names), rng) for _ in range(count)]


@torch.no_grad()
def sample(pipe: FluxPipeline, captions: list[str], seed: int = 0, **changes: Any) -> Image.Image:
    """Images of the captions in a row of eight, magnified three times."""
    seeds = [seed + index for index in range(len(captions))]
    images = pipe(captions, **call_arguments(seeds, **changes)).images
    return sheet(images)


def sheet(images: list[Image.Image], columns: int = 8, magnified: int = 3) -> Image.Image:
    """A grid of images, left to right, then down."""
    side, gap = images[0].width * magnified, 4
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    canvas = Image.new("RGB", (columns * (side + gap) - gap, rows * (side + gap) - gap), "white")
    for index, image in enumerate(images):
        large = image.resize((side, side), Image.Resampling.NEAREST)
        canvas.paste(large, (index % columns * (side + gap), index // columns * (side + gap)))
    return canvas


@click.command()
@click.option("--model", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="PNG to write.")
@click.option("--count", default=32, show_default=True)
@click.option("--seed", default=1, show_default=True, help="Of the captions and of the noise.")
@click.option("--guidance", default=GUIDANCE, show_default=True)
@click.option("--steps", default=STEPS, show_default=True)
@click.option("--text-tokens", default=CAPTION_TOKENS, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(
    model: Path,
    out: Path,
    count: int,
    seed: int,
    guidance: float,
    steps: int,
    text_tokens: int,
    threads: int,
) -> None:
    """Draw COUNT samples of held-out captions."""
    torch.set_num_threads(threads)
    _, names = read_names(model)
    captions = held_out_captions(names, count, seed)
    drawn = sample(
        load_model(model),
        captions,
        seed,
        true_cfg_scale=guidance,
        num_inference_steps=steps,
        max_sequence_length=text_tokens,
    )
    drawn.save(out)
    out.with_suffix(".txt").write_text("".join(f"{i + 1}. {c}\n" for i, c in enumerate(captions)))


if __name__ == "__main__":
    main()
