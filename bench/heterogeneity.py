"""What caching each group of blocks costs, over what skipping the whole step costs.

    python -m bench.heterogeneity --model pictures
    python -m bench.heterogeneity --model first --groups 4 --prompts 4

Of every group g: sum_t ||D[t,g,1]||^2 / sum_t ||v_{t-1} - v_t||^2, the error of reusing the group's
residual of the step before, all else computed, over the error of reusing the whole velocity of the
step before; and the group's share of the step's time. Caching a group pays where the first is below
the second.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from layercache.calibration import calibrate
from layercache.stats import CalibrationStats

PICTURES = Path(__file__).parent / "models" / "pictures"


def heterogeneity(stats: CalibrationStats) -> list[dict[str, Any]]:
    """One row a group: name, error over skipping, share of the step's time, per half of the steps.

    `early` and `late` are the ratio over the noisier and the cleaner half of the steps.
    """
    skipped = np.square(stats.velocities[:, :-1] - stats.velocities[:, 1:]).sum(axis=-1)
    cached = np.square(stats.deltas[:, 1:, :, 0]).sum(axis=-1)
    share = stats.times_ms[:, :-1].sum(axis=0) / stats.times_ms[:, :-1].sum()
    half = skipped.shape[1] // 2
    rows = []
    for index, group in enumerate(stats.groups):
        error = cached[:, :, index]
        rows.append(
            {
                "group": group.name,
                "ratio": float(error.sum() / skipped.sum()),
                "early": float(error[:, :half].sum() / skipped[:, :half].sum()),
                "late": float(error[:, half:].sum() / skipped[:, half:].sum()),
                "share": float(share[index]),
            }
        )
    return rows


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
        lags=1,
        probes=0,
        call_kwargs=arguments,
    )
    click.echo("group | error over skipping | noisier half | cleaner half | share of time")
    for row in heterogeneity(stats):
        figures = " | ".join(f"{row[key]:.2f}" for key in ("ratio", "early", "late", "share"))
        click.echo(f"{row['group']} | {figures}")


if __name__ == "__main__":
    main()
