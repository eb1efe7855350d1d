"""The command `trial`: plans of different kinds are run for real, and the best is kept."""

from __future__ import annotations

from pathlib import Path

import click

from layercache.cli._compiling import budgets_option
from layercache.cli._files import STATS_FILE
from layercache.cli._model import Model, model_options
from layercache.cli._options import (
    json_option,
    log,
    print_json,
    progress,
    prompts_option,
    read_prompts,
)
from layercache.cli._out import OUT_FILE, STDOUT, put
from layercache.plan import Budget
from layercache.stats import CalibrationStats


@click.command()
@click.argument("stats_file", type=STATS_FILE)
@model_options()
@budgets_option("A speedup (2x) or a share of the compute (0.73, 73%).")
@prompts_option()
@click.option("--seed", default=0, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--out", type=OUT_FILE, default=Path("plan.json"), show_default=True)
@json_option
def trial(
    stats_file: Path,
    model: Model,
    budgets: list[Budget],
    prompt_file: Path | None,
    count: int | None,
    seed: int,
    batch_size: int,
    repeats: int,
    out: Path,
    as_json: bool,
) -> None:
    """Compile plans of steps, of groups and of both, run them, and keep the best.

    It costs about a generation a plan and prompt, which is said first. The prompts of the
    calibration will do. The plan carries what was measured of it.
    """
    from layercache.choices import candidates
    from layercache.evaluation.trial import generations
    from layercache.evaluation.trial import trial as run

    if len(budgets) > 1:
        raise click.UsageError("--budget is given more than once: a trial is for one budget")
    stats = CalibrationStats.load(stats_file)
    prompts = read_prompts(prompt_file, model.name, "calibration", count or 8, limit=count)
    plans = candidates(stats, budgets[0])
    total = generations(len(plans), len(prompts), repeats)
    log(f"a trial of {', '.join(plans)} on {len(prompts)} prompts: {total} generations at most")
    pipe, arguments = model.under(next(iter(plans.values())), prompts[0])
    found = run(
        pipe,
        plans,
        prompts,
        call_kwargs=arguments,
        seed=seed,
        batch_size=batch_size,
        repeats=repeats,
        progress=progress(),
    )
    put(out, found.plan.to_bytes())
    measured = {name: plan.measured for name, plan in found.plans.items() if plan.measured}
    if as_json:
        seen = {name: each.model_dump(mode="json") for name, each in measured.items()}
        print_json({"file": str(out), "best": found.best, "measured": seen})
    elif out != STDOUT:
        for name, each in measured.items():
            click.echo(f"{'*' if name == found.best else ' '} {name:<7} {each}")
        log(f"wrote {out}: {found.best}")
