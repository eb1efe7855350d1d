"""What caching each group of blocks costs, over what skipping the whole step costs.

    python -m bench.heterogeneity --model pictures
    python -m bench.heterogeneity --model first --groups 4 --prompts 4

The table of `layercache inspect`, from a calibration made for it (see `prediction/_paying.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from layercache.calibration import calibrate
from layercache.prediction import paying

PICTURES = Path(__file__).parent / "models" / "pictures"


def _first(count: int) -> tuple[Any, list[str], int, dict[str, Any]]:
    from layercache.reference import call_arguments, load_pipeline, prompts

    arguments = call_arguments()
    steps = arguments.pop("num_inference_steps")
    arguments.pop("generator")
    return load_pipeline(), prompts("calibration", count), steps, arguments


def _pictures(folder: Path, count: int) -> tuple[Any, list[str], int, dict[str, Any]]:
    from bench.training.sample import call_arguments, load_model, training_captions
    from bench.training.state import read_names

    arguments = call_arguments([0], negative_prompt="")
    steps = arguments.pop("num_inference_steps")
    arguments.pop("generator")
    _, names = read_names(folder)
    return load_model(folder), training_captions(names, count, seed=0), steps, arguments


@click.command()
@click.option("--model", type=click.Choice(["first", "pictures"]), required=True)
@click.option("--folder", type=click.Path(path_type=Path), default=PICTURES, show_default=False)
@click.option("--groups", default="4", show_default=True)
@click.option("--prompts", "count", default=4, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(model: str, folder: Path, groups: str, count: int, threads: int) -> None:
    """Calibrate on COUNT prompts and print the table."""
    torch.set_num_threads(threads)
    chosen = _first(count) if model == "first" else _pictures(folder, count)
    pipe, prompts, steps, arguments = chosen
    stats = calibrate(
        pipe,
        prompts,
        num_inference_steps=steps,
        groups=int(groups) if groups.isdigit() else groups,
        lags=3,
        call_kwargs=arguments,
    )
    click.echo(paying(stats).table())


if __name__ == "__main__":
    main()
