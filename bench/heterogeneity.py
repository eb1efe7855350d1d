"""What caching each group of blocks costs, over what skipping the whole step costs.

    python -m bench.heterogeneity --model pictures
    python -m bench.heterogeneity --model main --groups 4 --prompts 4
    python -m bench.heterogeneity --model main --weights DIR      # of bench.reference.train

The table of `layercache inspect`, from a calibration made for it (see `layercache/paying.py`).
"""

from __future__ import annotations

from pathlib import Path

import click
import torch

from bench.comparison.scenario import SCENARIOS
from layercache.calibration import calibrate
from layercache.paying import paying


@click.command()
@click.option("--model", type=click.Choice(list(SCENARIOS)), required=True)
@click.option("--weights", type=click.Path(path_type=Path), help="Others of the reference model.")
@click.option("--groups", default="4", show_default=True)
@click.option("--prompts", "count", default=4, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(model: str, weights: Path | None, groups: str, count: int, threads: int) -> None:
    """Calibrate on COUNT prompts and print the table."""
    torch.set_num_threads(threads)
    scenario = SCENARIOS[model]
    arguments = scenario.arguments()
    stats = calibrate(
        scenario.load(weights),
        scenario.prompts("calibration", count),
        num_inference_steps=arguments.pop("num_inference_steps"),
        groups=int(groups) if groups.isdigit() else groups,
        lags=3,
        call_kwargs=arguments,
    )
    click.echo(paying(stats).table())


if __name__ == "__main__":
    main()
