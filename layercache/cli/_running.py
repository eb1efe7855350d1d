"""Commands that run a model under plans: `refine` and `eval`."""

from __future__ import annotations

from pathlib import Path

import click

from layercache.cli._files import PLAN_FILE, STATS_FILE
from layercache.cli._model import Model, model_options
from layercache.cli._options import (
    GateFailed,
    hand_out,
    json_option,
    log,
    print_json,
    progress,
    prompts_option,
    read_prompts,
)
from layercache.cli._out import OUT_FILE, OUT_FOLDER, put
from layercache.plan import Plan
from layercache.stats import CalibrationStats


@click.command()
@click.argument("plan_file", type=PLAN_FILE)
@click.option(
    "--stats", "stats_file", type=STATS_FILE, required=True, help="What the plan was compiled from."
)
@model_options()
@prompts_option(least=2)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=OUT_FILE, default=Path("plan.json"), show_default=True)
@json_option
def refine(
    plan_file: Path,
    stats_file: Path,
    model: Model,
    prompt_file: Path | None,
    count: int | None,
    seed: int,
    out: Path,
    as_json: bool,
) -> None:
    """Fit a plan's coefficients again while it runs; can pay at 4x and above."""
    from layercache.refine import refine_plan

    prompts = read_prompts(prompt_file, model.name, "calibration", count or 8, limit=count)
    plan, stats = Plan.load(plan_file), CalibrationStats.load(stats_file)
    pipe, arguments = model.under(plan, prompts[0])
    plan = refine_plan(
        pipe,
        plan,
        stats,
        prompts,
        seed=seed,
        call_kwargs=arguments,
        log=log,
    )
    hand_out(plan, out, as_json)


@click.command("eval")
@click.argument("plan_file", type=PLAN_FILE)
@model_options()
@prompts_option()
@click.option("--seed", default=2, show_default=True)
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="[default: 1; of the reference model 8]"
)
@click.option("--repeats", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--min-psnr", type=float, help="Exit with 4 if the mean PSNR in dB is lower.")
@click.option("--min-speedup", type=float, help="Exit with 4 if the measured speedup is lower.")
@click.option(
    "--out", type=OUT_FOLDER, help="Also write pictures, results.json and report.html there."
)
@click.option("--record", type=OUT_FILE, help="File for the plan with what was measured of it.")
@json_option
def evaluate(
    plan_file: Path,
    model: Model,
    prompt_file: Path | None,
    count: int | None,
    seed: int,
    batch_size: int | None,
    repeats: int,
    min_psnr: float | None,
    min_speedup: float | None,
    out: Path | None,
    record: Path | None,
    as_json: bool,
) -> None:
    """Measure a plan's speed and fidelity beside two controls: uniform skipping, fewer steps."""
    from layercache.evaluation.evaluate import evaluate_plan

    plan = Plan.load(plan_file)
    prompts = read_prompts(prompt_file, model.name, "held-out", count or 16, limit=count)
    pipe, arguments = model.under(plan, prompts[0])
    comparison = evaluate_plan(
        pipe,
        plan,
        prompts,
        call_kwargs=arguments,
        seed=seed,
        batch_size=batch_size or (8 if model.is_reference else 1),
        repeats=repeats,
        out=out,
        progress=progress(),
    )
    row = comparison.rows[0]
    if record is not None:
        from layercache.evaluation.trial import measured

        seen = measured(pipe, plan, comparison, row.method, calibration_prompts=False)
        put(record, plan.model_copy(update={"measured": seen}).to_bytes())
    failures = [
        f"{label} is {value:.2f}{unit}, below the gate of {gate:.2f}{unit}"
        for label, value, gate, unit in (
            ("mean PSNR", row.psnr_mean, min_psnr, " dB"),
            ("measured speedup", row.speedup_measured, min_speedup, "x"),
        )
        if gate is not None and value < gate
    ]
    if min_speedup is not None and row.timing_doubt:
        failures.append(f"measured speedup is unclear: {row.timing_doubt}")
    if as_json:
        print_json(comparison.to_dict() | {"gate_failures": failures})
    else:
        click.echo(comparison.table())
    if failures:
        raise GateFailed("; ".join(failures))
