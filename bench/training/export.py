"""Write a run as a folder that diffusers' unmodified `FluxPipeline.from_pretrained` loads.

python -m bench.training.export --run DIR --out bench/models/pictures
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

from bench.training.autoencoder import load_autoencoder
from bench.training.model import Painting
from bench.training.scenes import vocabulary
from bench.training.state import read_names, write_names

SHIFT = 2.0
SHARD = "12MB"


def assemble(model: Painting, autoencoder: AutoencoderKL, mean: float, std: float) -> FluxPipeline:
    """The parts as a pipeline; latents are (autoencoder's - mean) / std."""
    autoencoder.register_to_config(shift_factor=mean, scaling_factor=1 / std)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=autoencoder,
        text_encoder=model.clip,
        tokenizer=model.tokenizers[0],
        text_encoder_2=model.t5,
        tokenizer_2=model.tokenizers[1],
        transformer=model.transformer,
    )


def load_run(run: Path, **changes: Any) -> FluxPipeline:
    """A run's averaged weights as a pipeline in single precision."""
    names, _ = read_names(run)
    latents = torch.load(run / "latents.pt", weights_only=True, mmap=True)
    model = Painting(vocabulary(names), **changes.get("transformer", {}))
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state["average"][name])
    autoencoder = load_autoencoder(run, **changes.get("autoencoder", {}))
    return assemble(model.eval(), autoencoder, latents["mean"], latents["std"])


def export(run: Path, out: Path, **changes: Any) -> None:
    """Write the pipeline of a run to `out` in half precision, in shards below 16 MB."""
    pipe = load_run(run, **changes).to(dtype=torch.float16)
    pipe.save_pretrained(out, max_shard_size=SHARD, safe_serialization=True)
    write_names(out, *read_names(run))


@click.command()
@click.option("--run", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(run: Path, out: Path) -> None:
    """Export the averaged weights of RUN to OUT."""
    export(run, out)


if __name__ == "__main__":
    main()
