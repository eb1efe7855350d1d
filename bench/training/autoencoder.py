"""Train the autoencoder, and encode the scenes that the transformer learns from.

    python -m bench.training.autoencoder train --pictures FONT --out DIR
    python -m bench.training.autoencoder encode --pictures FONT --out DIR

64x64 pixels become 16x16 latents, which FLUX packs into 64 tokens. The decoder is trained on noisy
latents, so that it forgives what the transformer gets slightly wrong. Batch i is a function of
(seed, i) alone.
"""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from bench.training.pictures import load_pictures
from bench.training.scenes import JITTER, Painter, Scene, held_out_scene, training_scene
from bench.training.state import save_atomically, write_names

ARCHITECTURE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (32, 64, 96),
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 8,
    "sample_size": 64,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
SCENE_STREAM, AUTOENCODER_STREAM, HELD_OUT_STREAM = 11, 12, 13
KL_WEIGHT = 2e-3
NOISE = 0.15
"""Standard deviation of the noise on latents that the decoder sees, over that of the latents."""


def build_autoencoder(**changes: Any) -> AutoencoderKL:
    """The untrained autoencoder; `changes` override the architecture (for tests)."""
    return AutoencoderKL(**(ARCHITECTURE | changes))


def pixel_batch(painter: Painter, seed: int, index: int, size: int) -> Tensor:
    """Training batch `index`: (size, 3, 64, 64) in [-1, 1]."""
    rng = np.random.default_rng([AUTOENCODER_STREAM, seed, index])
    scenes = [training_scene(rng, painter.names, JITTER) for _ in range(size)]
    return torch.from_numpy(np.stack([painter.render(scene) for scene in scenes]))


def autoencoder_loss(model: AutoencoderKL, pixels: Tensor, noise: Tensor) -> Tensor:
    """Absolute and squared error of the pixels, and a little of the Kullback-Leibler term.

    Args:
        model: the autoencoder.
        pixels: (B, 3, H, W) in [-1, 1].
        noise: two draws of a standard normal, (2, B, C, h, w).
    """
    posterior = model.encode(pixels).latent_dist
    latents = posterior.mean + posterior.std * noise[0]
    latents = latents + NOISE * latents.detach().std() * noise[1]
    error = model.decode(latents).sample - pixels
    divergence = posterior.mean.pow(2) + posterior.var - 1 - posterior.logvar
    loss: Tensor = error.abs().mean() + error.pow(2).mean() + KL_WEIGHT * divergence.mean()
    return loss


@torch.no_grad()
def psnr(model: AutoencoderKL, pixels: Tensor) -> float:
    """Mean PSNR in dB of reconstructions from the mean latents."""
    decoded = model.decode(model.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    squared = (decoded - pixels).pow(2).mean(dim=(1, 2, 3)) / 4
    return float((-10 * squared.log10()).mean())


@torch.no_grad()
def encode_scenes(
    model: AutoencoderKL, painter: Painter, scenes: list[Scene], batch: int = 128
) -> Tensor:
    """Mean latents of scenes, (N, C, h, w), as the autoencoder gives them (not normalised)."""
    parts = []
    for start in range(0, len(scenes), batch):
        pixels = np.stack([painter.render(scene) for scene in scenes[start : start + batch]])
        parts.append(model.encode(torch.from_numpy(pixels)).latent_dist.mean)
    return torch.cat(parts)


def dataset_scenes(names: list[str], seed: int, count: int) -> list[Scene]:
    """The scenes of the cached data set: a function of (names, seed, count) alone."""
    rng = np.random.default_rng([SCENE_STREAM, seed])
    return [training_scene(rng, names) for _ in range(count)]


def held_out_scenes(names: list[str], seed: int, count: int) -> list[Scene]:
    """Scenes of combinations that are never trained on."""
    rng = np.random.default_rng([HELD_OUT_STREAM, seed])
    return [held_out_scene(rng, names) for _ in range(count)]


def train_autoencoder(
    painter: Painter,
    model: AutoencoderKL,
    out: Path,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    every: int = 50,
    until: int | None = None,
) -> None:
    """Train for `steps`, resuming from OUT/autoencoder.pt; the rate falls to zero.

    `until` stops earlier, as a kill would.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    checkpoint, first, seconds = out / "autoencoder.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        first, seconds = state["step"], state["seconds"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    model = model.to(memory_format=torch.channels_last)
    started = time.monotonic() - seconds
    for step in range(first, steps if until is None else until):
        pixels = pixel_batch(painter, seed, step, batch)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        side = pixels.shape[-1] // 2 ** (len(model.config.block_out_channels) - 1)
        shape = (2, batch, model.config.latent_channels, side, side)
        noise = torch.randn(shape, generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = autoencoder_loss(model, pixels.to(memory_format=torch.channels_last), noise)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50, (steps - step) / (0.5 * steps))
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % every == 0 or step + 1 == steps:
            seconds = time.monotonic() - started
            quality = psnr(model, pixel_batch(painter, seed + 1_000_000, 0, 64))
            with open(out / "autoencoder_log.csv", "a", newline="") as file:
                csv.writer(file).writerow(
                    [step + 1, f"{seconds:.1f}", f"{float(loss.detach()):.5f}", f"{quality:.2f}"]
                )
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_atomically(checkpoint, state | {"step": step + 1, "seconds": seconds})


def load_autoencoder(out: Path, **changes: Any) -> AutoencoderKL:
    """The trained autoencoder of a run, with the decoder that was trained further if there is."""
    model = build_autoencoder(**changes)
    model.load_state_dict(torch.load(out / "autoencoder.pt", weights_only=True)["model"])
    if (out / "decoder.pt").exists():
        model.decoder.load_state_dict(torch.load(out / "decoder.pt", weights_only=True)["model"])
    return model.eval()


def encode_dataset(
    painter: Painter, model: AutoencoderKL, out: Path, count: int, seed: int
) -> None:
    """Write OUT/latents.pt: normalised latents in half precision, and their mean and deviation."""
    latents = encode_scenes(model, painter, dataset_scenes(painter.names, seed, count))
    mean, deviation = float(latents.mean()), float(latents.std())
    state = {"latents": ((latents - mean) / deviation).half(), "mean": mean, "std": deviation}
    save_atomically(out / "latents.pt", state | {"seed": seed})
    write_names(out, painter.names, painter.names)


def adopt_autoencoder(weights: Path, painter: Painter, out: Path, count: int, seed: int) -> None:
    """Take the autoencoder of an exported pipeline, and encode the data set as it was encoded."""
    model = AutoencoderKL.from_pretrained(weights / "vae", torch_dtype=torch.float32)
    mean, deviation = model.config.shift_factor, 1 / model.config.scaling_factor
    save_atomically(out / "autoencoder.pt", {"model": model.state_dict()})
    latents = encode_scenes(model.eval(), painter, dataset_scenes(painter.names, seed, count))
    state = {"latents": ((latents - mean) / deviation).half(), "mean": mean, "std": deviation}
    save_atomically(out / "latents.pt", state | {"seed": seed})
    write_names(out, painter.names, painter.names)


@click.command()
@click.argument("action", type=click.Choice(["train", "encode", "from-weights"]))
@click.option("--pictures", required=True, help="NotoColorEmoji.ttf or a folder of PNG files.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option("--weights", type=click.Path(path_type=Path), help="Exported folder to go on from.")
@click.option("--steps", default=1500, show_default=True, help="Training steps.")
@click.option("--batch", default=16, show_default=True)
@click.option("--lr", default=1.5e-3, show_default=True)
@click.option("--count", default=40_000, show_default=True, help="Scenes to encode.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(
    action: str,
    pictures: str,
    out: Path,
    weights: Path | None,
    steps: int,
    batch: int,
    lr: float,
    count: int,
    seed: int,
    threads: int,
) -> None:
    """Train the autoencoder; with it, or with that of WEIGHTS, encode the transformer's data."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    painter = Painter(load_pictures(pictures))
    if action == "train":
        train_autoencoder(painter, build_autoencoder(), out, steps, batch, lr, seed)
    elif action == "from-weights":
        if weights is None:
            raise click.UsageError("from-weights takes the autoencoder of a model: add --weights")
        adopt_autoencoder(weights, painter, out, count, seed)
    else:
        encode_dataset(painter, load_autoencoder(out), out, count, seed)


if __name__ == "__main__":
    main()
