"""Train the transformer and its text encoders on cached latents.

    python -m bench.training.train --out DIR

Flow matching: z = (1 - sigma) x + sigma noise, and the transformer learns noise - x. Sigmas are
logit-normal, shifted towards noise. The hidden matrices are optimised by Muon, all else by AdamW;
the learning rate is flat, then falls linearly to zero; the weights that are exported are an
exponential moving average. A run that is killed resumes from DIR/checkpoint.pt and equals one that
was not. `--steps` may be changed at a resume as long as the rate has not begun to fall.

Several processes share a batch, as `torchrun` starts them; that bears a busy machine better than
several threads do, as they wait for one another once a step only.
"""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, distributed, nn

from bench.training.autoencoder import (
    dataset_scenes,
    encode_scenes,
    held_out_scenes,
    load_autoencoder,
)
from bench.training.data import Batch, Batches
from bench.training.model import Painting, is_hidden_matrix
from bench.training.pictures import FIRST, load_pictures
from bench.training.scenes import Painter, Scene, vocabulary
from bench.training.state import save_atomically, write_names

EMA_DECAY = 0.998
WARMUP_STEPS = 100
DECAY_SHARE = 0.3
ADAMW_SHARE = 1 / 3
VALIDATION_SCENES = 256
VALIDATION_BATCH = 64


def learning_rate_factor(step: int, steps: int) -> float:
    """Warm-up, then flat, then linear to zero over the last `DECAY_SHARE` of the run."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (DECAY_SHARE * steps))


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their mean over the processes, where there are several."""
    if not distributed.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, mean in zip(gradients, torch.split(flat, sizes), strict=True):
        gradient.copy_(mean.view_as(gradient))


def shown_only(scenes: list[Scene], latents: Tensor, names: set[str]) -> tuple[list[Scene], Tensor]:
    """The scenes that show nothing but the named pictures, and their latents."""
    kept = [i for i, s in enumerate(scenes) if all(part.name in names for part in s.parts)]
    return [scenes[i] for i in kept], latents[torch.tensor(kept)]


class Trainer:
    """The state of a run, and one step of it."""

    def __init__(self, model: Painting, lr: float) -> None:
        self.model = model
        self.named = dict(model.named_parameters())
        hidden = [p for n, p in self.named.items() if is_hidden_matrix(n, p)]
        other = [p for n, p in self.named.items() if not is_hidden_matrix(n, p)]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(hidden, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(
                other, lr=lr * ADAMW_SHARE, betas=(0.9, 0.99), weight_decay=0.0, fused=True
            ),
        ]
        self.rates = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self.average = {n: p.detach().clone() for n, p in self.named.items()}
        self.step, self.seconds = 0, 0.0

    def advance(self, batch: Batch, steps: int) -> float:
        """One step of `steps` in all; returns the loss."""
        stance = "force_eager" if batch.padded_long else "default"
        with torch.compiler.set_stance(stance):
            loss = self.model.loss(batch)
            torch.autograd.backward(loss)
        average_gradients(self.named.values())
        nn.utils.clip_grad_norm_(self.named.values(), 1.0)
        factor = learning_rate_factor(self.step, steps)
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
        # A short memory at first, so that the average does not carry the initial weights for long.
        decay = min(EMA_DECAY, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.values()), [p.data for p in self.named.values()], 1 - decay
            )
        self.step += 1
        return float(loss.detach())

    @contextmanager
    def averaged(self) -> Iterator[Painting]:
        """The model with its averaged weights, for as long as the context lasts."""
        current = {n: p.detach().clone() for n, p in self.named.items()}
        self._load(self.average)
        try:
            yield self.model
        finally:
            self._load(current)

    def _load(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(weights[name])

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "average": self.average,
            "parameters": {n: p.detach() for n, p in self.named.items()},
            "optimizers": [o.state_dict() for o in self.optimizers],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()`."""
        self.step, self.seconds, self.average = state["step"], state["seconds"], state["average"]
        self._load(state["parameters"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Begin a new run at given weights, for instance those of an exported model."""
        self._load({name: weights[name].float() for name in self.named})
        self.average = {n: p.detach().clone() for n, p in self.named.items()}


@torch.no_grad()
def validation_loss(model: Painting, batches: Batches, count: int = 4) -> float:
    """Mean loss over the first batches of held-out combinations."""
    return sum(float(model.loss(batches[i])) for i in range(count)) / count


def run(
    trainer: Trainer,
    batches: Batches,
    validation: Batches,
    out: Path,
    steps: int,
    every: int,
    until: int | None = None,
    rank: int = 0,
) -> None:
    """Train for `steps`, logging and saving every `every` steps and at the end.

    `until` stops earlier, as a kill would. Process 0 logs and saves.
    """
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        trainer.restore(torch.load(checkpoint, weights_only=True))
        if distributed.is_initialized():
            distributed.barrier()  # before process 0 may write it again
        click.echo(f"resumed at step {trainer.step}", err=True)
    window: list[float] = []
    started = time.monotonic() - trainer.seconds
    while trainer.step < (steps if until is None else until):
        batch = batches[trainer.step]
        loss = trainer.advance(batch, steps)
        if not batch.padded_long:
            window.append(loss)
        trainer.seconds = time.monotonic() - started
        if rank == 0 and (trainer.step % every == 0 or trainer.step == steps):
            with trainer.averaged() as model:
                held_out = validation_loss(model, validation)
            mean = sum(window) / max(1, len(window))
            with open(out / "training_log.csv", "a", newline="") as file:
                row = [trainer.step, f"{trainer.seconds:.0f}", f"{mean:.5f}", f"{held_out:.5f}"]
                csv.writer(file).writerow(row)
            window.clear()
            save_atomically(checkpoint, trainer.state())


def weights_of_export(folder: Path) -> dict[str, Tensor]:
    """The weights of an exported pipeline under the names that training gives them."""
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(folder)
    parts = {
        "transformer": pipe.transformer,
        "clip": pipe.text_encoder,
        "t5": pipe.text_encoder_2,
    }
    return {f"{part}.{n}": p for part, m in parts.items() for n, p in m.named_parameters()}


@click.command()
@click.option("--pictures", required=True, help="NotoColorEmoji.ttf or a folder of PNG files.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option("--steps", default=5000, show_default=True, help="Training steps in all.")
@click.option("--batch", default=64, show_default=True, help="Of all processes together.")
@click.option("--lr", default=4e-3, show_default=True, help="Of Muon; AdamW takes a third.")
@click.option("--seed", default=0, show_default=True)
@click.option("--save-every", default=100, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True)
@click.option("--first/--all", "first", default=False, help="Only the pictures that differ most.")
@click.option(
    "--from-weights", type=click.Path(path_type=Path), help="Exported folder to start from."
)
def main(
    pictures: str,
    out: Path,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    save_every: int,
    threads: int,
    compiled: bool,
    first: bool,
    from_weights: Path | None,
) -> None:
    """Train on OUT/latents.pt (see bench.training.autoencoder), resuming where it can."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    # The fused kernel's backward pass is slow on the CPU: with it a step takes 1.7 times as long.
    torch.backends.cuda.enable_flash_sdp(False)
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world > 1:
        distributed.init_process_group("gloo")
    painter = Painter(load_pictures(pictures))
    names = [name for name in painter.names if name in FIRST or not first]
    cached = torch.load(out / "latents.pt", weights_only=True)
    scenes = dataset_scenes(painter.names, cached["seed"], len(cached["latents"]))
    scenes, latents = shown_only(scenes, cached["latents"], set(names))
    model = Painting(vocabulary(painter.names))
    trainer = Trainer(model, lr)
    if from_weights is not None:
        trainer.start_from(weights_of_export(from_weights))
    if compiled:
        model.transformer.compile_repeated_blocks()
    held_out = held_out_scenes(names, seed, VALIDATION_SCENES if rank == 0 else 1)
    unseen = encode_scenes(load_autoencoder(out), painter, held_out)
    unseen = (unseen - cached["mean"]) / cached["std"]
    if rank == 0:
        counts = {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()}
        settings = {"batch": batch, "lr": lr, "processes": world, "scenes": len(scenes)}
        (out / "training.json").write_text(json.dumps(counts | settings) + "\n")
        write_names(out, painter.names, names)
    run(
        trainer,
        Batches(latents, scenes, model.tokenizers, seed, batch // world, rank=rank),
        Batches(
            unseen, held_out, model.tokenizers, seed + 1_000_000, VALIDATION_BATCH, long_every=0
        ),
        out,
        steps,
        save_every,
        rank=rank,
    )


if __name__ == "__main__":
    main()
