"""Plot the losses of a run: `python -m bench.training.curve --log training_log.csv --out loss.png`.

The log holds step, seconds, mean training loss since the row before, and loss of the averaged
weights on held-out combinations.
"""

from __future__ import annotations

import csv
from pathlib import Path

import click


def read_log(path: Path) -> list[tuple[float, ...]]:
    """Rows of the log; where a resumed run repeated steps, the later row counts."""
    with open(path, newline="") as file:
        rows = {int(row[0]): tuple(float(value) for value in row) for row in csv.reader(file)}
    return [rows[step] for step in sorted(rows)]


@click.command()
@click.option("--log", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="PNG to write.")
def main(log: Path, out: Path) -> None:
    """Plot training and held-out loss over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, _, training, held_out = zip(*read_log(log), strict=True)
    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    axes.plot(steps, training, label="training")
    axes.plot(steps, held_out, label="held-out combinations, averaged weights")
    axes.set(xlabel="step", ylabel="mean squared velocity error", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
