"""Write the plans of the reference model that ship: `python plans/make_reference.py`.

Calibrated on 16 prompts, compiled for 1.37x, 2x, 3x and 4x, and measured on 16 held-out prompts, to
which nothing was fitted and by which nothing was chosen. About ten minutes on two cores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from layercache import Plan, pareto
from layercache.calibration import calibrate
from layercache.evaluation.trial import trial
from layercache.reference import call_arguments, load_pipeline, prompts

FOLDER = Path(__file__).parent / "reference"
BUDGETS = ("1.37x", "2x", "3x", "4x")


def table(plans: dict[str, Plan]) -> str:
    """What was foretold and what was seen, as Markdown."""
    lines = [
        "| plan | compute | foretold: speed, PSNR median (worst) | measured: speed, PSNR median "
        "(mean; a tenth below; worst) | SSIM | visibly changed |",
        "|---|---|---|---|---|---|",
    ]
    for budget, plan in plans.items():
        p, m = plan.predicted, plan.measured
        assert m is not None and m.ssim is not None and m.changed is not None
        lines.append(
            f"| [{budget}](reference/{budget}.json) | {100 * p.compute_share:.0f} % | "
            f"{p.speedup:.2f}x, {p.psnr_median_db:.1f} ({p.psnr_worst_db:.1f}) dB | "
            f"{m.speedup:.2f}x, {m.psnr_median_db:.1f} ({m.psnr_db:.1f}; {m.psnr_tenth_db:.1f}; "
            f"{m.psnr_worst_db:.1f}) dB | {m.ssim:.4f} | {100 * m.changed:.0f} % |"
        )
    return "\n".join(lines)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=FOLDER)
@click.option("--steps", default=50, show_default=True)
@click.option("--calibration", default=16, show_default=True, help="Prompts.")
@click.option("--held-out", default=16, show_default=True, help="Prompts.")
@click.option("--batch-size", default=8, show_default=True)
@click.option("--budget", "budgets", multiple=True, default=BUDGETS)
def main(
    out: Path,
    steps: int,
    calibration: int,
    held_out: int,
    batch_size: int,
    budgets: tuple[str, ...],
) -> None:
    """Write the plans, and print their table."""
    pipe = load_pipeline()
    call: dict[str, Any] = call_arguments()
    del call["generator"], call["num_inference_steps"]
    stats = calibrate(
        pipe,
        prompts("calibration", calibration),
        num_inference_steps=steps,
        batch_size=batch_size,
        call_kwargs=call,
    )
    compiled = dict(zip(budgets, pareto(stats, list(budgets)), strict=True))
    found = trial(
        pipe,
        compiled,
        prompts("held-out", held_out),
        call_kwargs=call,
        seed=2,
        batch_size=batch_size,
        calibration_prompts=False,
    )
    for budget, plan in found.plans.items():
        plan.save(out / f"{budget}.json")
    click.echo(table(dict(found.plans)))


if __name__ == "__main__":
    main()
