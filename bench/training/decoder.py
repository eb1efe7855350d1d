"""Train the decoder further on the cached latents, the encoder unchanged.

    python -m bench.training.decoder --pictures FONT --out DIR

The latents that the transformer learns stay as they are, so this can run after it or beside it.
Writes DIR/decoder.pt, which `load_autoencoder` prefers; resumes from it.
"""

from __future__ import annotations

import csv
import time
from pathlib import Path

import click
import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from bench.training.autoencoder import dataset_scenes, held_out_scenes, load_autoencoder
from bench.training.pictures import load_pictures
from bench.training.scenes import Painter
from bench.training.state import save_atomically

DECODER_STREAM = 15
NOISE = 0.05
"""Standard deviation of the noise on normalised latents."""


def decoder_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Absolute and squared error of the pixels, and absolute error of their differences."""
    error = decoded - pixels
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.pow(2).mean() + 0.5 * edges


@torch.no_grad()
def held_out_psnr(model: AutoencoderKL, painter: Painter, count: int = 64) -> float:
    """Mean PSNR in dB of held-out scenes through encoder and decoder."""
    scenes = held_out_scenes(painter.names, 0, count)
    pixels = torch.from_numpy(np.stack([painter.render(scene) for scene in scenes]))
    decoded = model.decode(model.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    squared = (decoded - pixels).pow(2).mean(dim=(1, 2, 3)) / 4
    return float((-10 * squared.log10()).mean())


def train_decoder(
    painter: Painter,
    model: AutoencoderKL,
    out: Path,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    every: int = 50,
) -> None:
    """Train the decoder for `steps`, resuming from OUT/decoder.pt; the rate falls to zero."""
    cached = torch.load(out / "latents.pt", weights_only=True)
    scenes = dataset_scenes(painter.names, cached["seed"], len(cached["latents"]))
    model.requires_grad_(False)
    decoder = model.decoder.requires_grad_(True).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0)
    checkpoint, first, seconds = out / "decoder.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        first, seconds = state["step"], state["seconds"]
        decoder.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    started = time.monotonic() - seconds
    for step in range(first, steps):
        rng = np.random.default_rng([DECODER_STREAM, seed, step])
        chosen = rng.integers(len(scenes), size=batch)
        pixels = torch.from_numpy(np.stack([painter.render(scenes[i]) for i in chosen]))
        latents = cached["latents"][torch.from_numpy(chosen)].float()
        noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))
        latents = (latents + NOISE * noise) * cached["std"] + cached["mean"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            decoded = decoder(latents.to(memory_format=torch.channels_last))
        loss = decoder_loss(decoded.float(), pixels)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20, (steps - step) / (0.5 * steps))
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % every == 0 or step + 1 == steps:
            seconds = time.monotonic() - started
            row = [step + 1, f"{seconds:.0f}", f"{float(loss.detach()):.5f}"]
            with open(out / "decoder_log.csv", "a", newline="") as file:
                csv.writer(file).writerow([*row, f"{held_out_psnr(model, painter):.2f}"])
            state = {"model": decoder.state_dict(), "optimizer": optimizer.state_dict()}
            save_atomically(checkpoint, state | {"step": step + 1, "seconds": seconds})


@click.command()
@click.option("--pictures", required=True, help="NotoColorEmoji.ttf or a folder of PNG files.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option("--steps", default=1000, show_default=True)
@click.option("--batch", default=16, show_default=True)
@click.option("--lr", default=1e-3, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(
    pictures: str, out: Path, steps: int, batch: int, lr: float, seed: int, threads: int
) -> None:
    """Train the decoder of the autoencoder in OUT further."""
    torch.set_num_threads(threads)
    painter = Painter(load_pictures(pictures))
    train_decoder(painter, load_autoencoder(out), out, steps, batch, lr, seed)


if __name__ == "__main__":
    main()
