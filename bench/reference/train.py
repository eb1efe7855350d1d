"""Train the reference model: `python -m bench.reference.train --out DIR`.

Flow matching on procedural scenes: z = (1 - sigma) x + sigma noise, and the transformer learns the
velocity noise - x. Sigmas are logit-normal, shifted towards noise as the sampler's are. The hidden
matrices are optimised by Muon, all else by AdamW; the learning rate is flat, then falls linearly to
zero; the weights that are shipped are an exponential moving average.

Batch i is a function of (seed, i) alone, so that a run which is killed and resumed sees the same
data as one that is not.

With `--drop-first RATE` each block of the first half is left out of a batch with that probability
(LayerDrop, arXiv 1909.11556), which makes the others do without it: a test bed on which layers can
be cached (`bench/FINDINGS.md`).
"""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor, nn
from tqdm import tqdm

from bench.reference.drawing import render
from layercache.reference._scenes import RESOLUTION, describe, sample_scene
from layercache.reference._text import WordEncoder, WordTokenizer
from layercache.reference._vae import PixelUnshuffleVAE
from layercache.reference.prompts import TRAINING_STREAM

ARCHITECTURE: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 48,
    "out_channels": 12,
    "num_layers": 32,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "axes_dims_rope": (4, 6, 6),
}
GRID = RESOLUTION // 4
CAPTION_TOKENS = 22
CAPTION_DROPOUT = 0.1
SIGMA_SHIFT = 2.0
EMA_DECAY = 0.998
WARMUP_STEPS = 60
DECAY_SHARE = 0.3
STALE = 0.2


class Batches:
    """Training batch i: packed latents (B, 64, 48), token ids (B, 22), sigmas (B,), noise."""

    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size
        self.vae, self.tokenizer = PixelUnshuffleVAE(), WordTokenizer()

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rng = np.random.default_rng([TRAINING_STREAM, self.seed, index])
        ids = torch.zeros(self.size, CAPTION_TOKENS, dtype=torch.long)
        images = []
        for row in range(self.size):
            scene = sample_scene(rng)
            images.append(render(scene))
            caption = "" if rng.random() < CAPTION_DROPOUT else describe(scene, rng)
            tokens = self.tokenizer.encode(caption)
            ids[row, : len(tokens)] = torch.tensor(tokens)
        latents = self.vae.encode(torch.from_numpy(np.stack(images)))
        packed = QwenImagePipeline._pack_latents(latents, self.size, 12, 2 * GRID, 2 * GRID)
        u = 1 / (1 + np.exp(-rng.standard_normal(self.size)))
        sigmas = SIGMA_SHIFT * u / (1 + (SIGMA_SHIFT - 1) * u)
        noise = rng.standard_normal(packed.shape, dtype=np.float32)
        return packed, ids, torch.from_numpy(sigmas).float(), torch.from_numpy(noise)


def build_transformer() -> QwenImageTransformer2DModel:
    """The architecture with adaLN-zero initialisation: every block starts as the identity."""
    model = QwenImageTransformer2DModel(**ARCHITECTURE)
    for block in model.transformer_blocks:
        for modulation in (block.img_mod[1], block.txt_mod[1]):
            nn.init.zeros_(modulation.weight)
            nn.init.zeros_(modulation.bias)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    return model


@contextmanager
def first_half_dropped(
    model: QwenImageTransformer2DModel, rate: float, rng: np.random.Generator
) -> Iterator[None]:
    """Leave each block of the first half out with probability `rate`, for as long as this lasts."""
    blocks = model.transformer_blocks
    half = len(blocks) // 2
    drawn = rng.random(half) if rate else np.ones(half)
    kept = [block for block, value in zip(blocks, drawn, strict=False) if value >= rate]
    model.transformer_blocks = nn.ModuleList([*kept, *blocks[half:]])
    try:
        yield
    finally:
        model.transformer_blocks = blocks


def loss_of(
    model: QwenImageTransformer2DModel,
    encoder: WordEncoder,
    batch: tuple[Tensor, Tensor, Tensor, Tensor],
) -> Tensor:
    """Mean squared velocity error of one batch."""
    latents, ids, sigmas, noise = batch
    s = sigmas[:, None, None]
    velocity = model(
        (1 - s) * latents + s * noise,
        encoder.embedding(ids),
        ids > 0,
        sigmas,
        img_shapes=[[(1, GRID, GRID)]] * len(latents),
        return_dict=False,
    )[0]
    loss: Tensor = (velocity - (noise - latents)).pow(2).mean()
    return loss


class Streams(nn.Module):
    """In place of a block: notes the streams and returns them with something added."""

    def __init__(self, added: tuple[Tensor | float, Tensor | float] = (0.0, 0.0)) -> None:
        super().__init__()
        self.added = added
        self.seen: list[Tensor] = []

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """(text, image) as a block of the model returns them."""
        self.seen = [encoder_hidden_states, hidden_states]
        return encoder_hidden_states + self.added[0], hidden_states + self.added[1]


def stale_loss_of(
    model: QwenImageTransformer2DModel,
    encoder: WordEncoder,
    batch: tuple[Tensor, Tensor, Tensor, Tensor],
    rng: np.random.Generator,
) -> Tensor:
    """The same where the first half adds its residuals of the same path at higher noise levels."""
    latents, ids, sigmas, noise = batch
    higher = sigmas + torch.from_numpy(rng.random(len(sigmas))).float() * STALE
    blocks, half = model.transformer_blocks, len(model.transformer_blocks) // 2
    entry, leaving = Streams(), Streams()
    try:
        model.transformer_blocks = nn.ModuleList([entry, *blocks[:half], leaving])
        loss_of(model, encoder, (latents, ids, higher.clamp(max=1.0), noise))
        text, image = (out - into for out, into in zip(leaving.seen, entry.seen, strict=True))
        model.transformer_blocks = nn.ModuleList([Streams((text, image)), *blocks[half:]])
        return loss_of(model, encoder, batch)
    finally:
        model.transformer_blocks = blocks


def learning_rate_factor(step: int, steps: int) -> float:
    """Warm-up, then flat, then linear to zero over the last `DECAY_SHARE` of the run."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (DECAY_SHARE * steps))


def _save(path: Path, state: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--steps", default=6000, show_default=True, help="Training steps in all.")
@click.option("--batch", default=32, show_default=True)
@click.option("--lr", default=6e-3, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--from-weights", type=click.Path(path_type=Path), help="Exported folder to start from."
)
@click.option("--drop-first", default=0.0, show_default=True, help="Rate of layer dropping.")
@click.option("--stale-first", default=0.0, show_default=True, help="Share of stale batches.")
@click.option("--save-every", default=200, show_default=True)
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True)
def main(
    out: Path,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    from_weights: Path | None,
    drop_first: float,
    stale_first: float,
    save_every: int,
    compiled: bool,
) -> None:
    """Train, resuming from OUT/checkpoint.pt where there is one, and write the weights."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    if from_weights is None:
        model, encoder = build_transformer(), WordEncoder(width=ARCHITECTURE["joint_attention_dim"])
    else:
        model = QwenImageTransformer2DModel.from_pretrained(from_weights / "transformer").float()
        encoder = WordEncoder.from_pretrained(from_weights / "text_encoder").float()
        model.train()
    named = {f"transformer.{n}": p for n, p in model.named_parameters()}
    named |= {f"encoder.{n}": p for n, p in encoder.named_parameters()}
    hidden = [p for n, p in named.items() if p.ndim == 2 and ".transformer_blocks." in n]
    other = [p for n, p in named.items() if not (p.ndim == 2 and ".transformer_blocks." in n)]
    optimizers = [
        torch.optim.Muon(hidden, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(other, lr=lr / 3, weight_decay=0.0, fused=True),
    ]
    base_rates = [[g["lr"] for g in o.param_groups] for o in optimizers]
    average = {n: p.detach().clone() for n, p in named.items()}
    first, seconds = 0, 0.0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        first, seconds, average = state["step"], state["seconds"], state["average"]
        for name, parameter in named.items():
            parameter.data.copy_(state["parameters"][name])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        click.echo(f"resumed at step {first}", err=True)
    if compiled:
        model.compile_repeated_blocks()

    def save(step: int) -> None:
        state = {
            "step": step,
            "seconds": seconds,
            "average": average,
            "parameters": {n: p.detach() for n, p in named.items()},
            "optimizers": [o.state_dict() for o in optimizers],
        }
        _save(checkpoint, state)

    batches, validation = Batches(seed, batch), Batches(seed + 1_000_000, batch)
    window: list[float] = []
    started = time.monotonic() - seconds
    for step in tqdm(range(first, steps), initial=first, total=steps, mininterval=10):
        rng = np.random.default_rng([seed, step])
        with first_half_dropped(model, drop_first, rng):
            if rng.random() < stale_first:
                loss = stale_loss_of(model, encoder, batches[step], rng)
            else:
                loss = loss_of(model, encoder, batches[step])
            torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(named.values(), 1.0)
        factor = learning_rate_factor(step, steps)
        for optimizer, rates in zip(optimizers, base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
        # A short memory at first, so that the average does not carry the initial weights for long.
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, parameter in named.items():
                average[name].lerp_(parameter, 1 - decay)
        window.append(float(loss.detach()))
        seconds = time.monotonic() - started
        if (step + 1) % save_every == 0 or step + 1 == steps:
            with torch.no_grad():
                losses = [float(loss_of(model, encoder, validation[i])) for i in range(8)]
            with open(out / "training_log.csv", "a", newline="") as file:
                row = [step + 1, round(seconds, 1), np.mean(window), np.mean(losses)]
                csv.writer(file).writerow([str(x) for x in row])
            window.clear()
            save(step + 1)
    export(out, checkpoint)


def export(out: Path, checkpoint: Path) -> None:
    """Write the averaged weights of a checkpoint as fp16 safetensors in diffusers' layout."""
    state = torch.load(checkpoint, weights_only=True)
    model, encoder = build_transformer(), WordEncoder(width=ARCHITECTURE["joint_attention_dim"])
    for prefix, module in (("transformer.", model), ("encoder.", encoder)):
        weights = {n[len(prefix) :]: t for n, t in state["average"].items() if n.startswith(prefix)}
        module.load_state_dict(weights, strict=True)
    model.half().save_pretrained(out / "transformer")
    encoder.half().save_pretrained(out / "text_encoder")
    summary = {"steps": state["step"], "seconds": round(state["seconds"], 1)}
    (out / "training.json").write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
