"""The command `compile`: from statistics to plans. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from layercache.cli._files import STATS_FILE
from layercache.cli._options import STEPS, json_option, log, parse_size, print_json, progress
from layercache.cli._out import OUT_FILE, STDOUT, put
from layercache.errors import LayerCacheError
from layercache.options import PREDICTORS, SOLVERS, Options
from layercache.plan import Budget
from layercache.stats import CalibrationStats

BUDGET = "{budget}"


def _budgets(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> list[Budget]:
    try:
        return list(dict.fromkeys(Budget.parse(value) for value in values))
    except LayerCacheError as error:
        raise click.BadParameter(str(error), ctx, param) from error


def _names(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _numbers(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[float, ...] | None:
    if value is None:
        return None
    try:
        return tuple(float(part) for part in _names(ctx, param, value))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is no list of numbers", ctx, param) from error


def _pixels(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[int, int] | None:
    if value is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", value.strip().lower())
    if match is None:
        raise click.BadParameter(
            f"{value!r} is no size: give width and height, as in 1328x800", ctx, param
        )
    return int(match[1]), int(match[2])


def budgets_option(text: str) -> Callable[[Callable[..., Any]], Any]:
    """Add `--budget`, each budget once; how many there may be the command says."""
    return click.option(
        "--budget", "budgets", callback=_budgets, multiple=True, required=True, help=text
    )


# One a field of `Options`, whose name it has.
_ASKED = (
    click.option("--solver", type=click.Choice(SOLVERS), default="search", show_default=True),
    click.option(
        "--units",
        callback=_names,
        default="step,groups",
        show_default=True,
        help="What may be cached: step, groups, or both with a comma.",
    ),
    click.option("--predictor", type=click.Choice(PREDICTORS), default="fitted", show_default=True),
    click.option(
        "--max-cache-bytes", callback=parse_size, help="Limit for one image, such as 2GB."
    ),
    click.option(
        "--max-gap", type=click.IntRange(min=0), help="Most steps from a cached cell back."
    ),
    click.option(
        "--forced", callback=_numbers, default="", help="Steps that are computed, with commas."
    ),
    click.option("--sigmas", callback=_numbers, help="T+1 noise levels to compile for, by commas."),
)


def _asked_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_ASKED):
        command = option(command)
    return command


@click.command("compile")
@click.argument("stats_file", type=STATS_FILE)
@budgets_option(
    "A speedup (2x), a share of the compute (0.73, 73%) or a quality to keep: 40dB in the "
    "median, 40dB@10% for all but a tenth of the prompts. Any number of times."
)
@click.option("--steps", type=STEPS, help="Compile for another number of steps.")
@click.option(
    "--shift",
    type=click.FloatRange(min=0, min_open=True),
    help="Compile for another shift of the scheduler.",
)
@click.option("--size", callback=_pixels, help="Compile for another WIDTHxHEIGHT.")
@_asked_options
@click.option(
    "--out",
    type=OUT_FILE,
    help=f"{BUDGET} in it becomes each budget.  [default: plan.json; of several, "
    f"plan-{BUDGET}.json]",
)
@json_option
def compile_command(
    stats_file: Path,
    budgets: list[Budget],
    steps: int | None,
    shift: float | None,
    size: tuple[int, int] | None,
    out: Path | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Compile a plan for each budget from a statistics file. Needs no torch and no GPU."""
    from layercache.compile import pareto
    from layercache.retarget import resized, sigmas_for

    several = len(budgets) > 1
    name = str(out) if out is not None else f"plan-{BUDGET}.json" if several else "plan.json"
    if several and BUDGET not in name:
        raise click.UsageError(
            f"--out {name} is one file for {len(budgets)} plans: put {BUDGET} in it"
        )
    retargeted = steps is not None or shift is not None or size is not None
    if retargeted and asked["sigmas"] is not None:
        raise click.UsageError(
            "--sigmas are what --steps, --shift and --size give: leave either out"
        )
    if shift is not None and size is not None:
        raise click.UsageError("give --shift or --size: a size says what the shift is")
    context = click.get_current_context()
    files = [
        OUT_FILE.convert(name.replace(BUDGET, budget.text), None, context) for budget in budgets
    ]
    stats, options = CalibrationStats.load(stats_file), Options(**asked)
    if retargeted:
        options = replace(options, sigmas=sigmas_for(stats, steps=steps, shift=shift, size=size))
    if size is not None:
        stats = resized(stats, size)
    with _levels() as progressed:
        plans = pareto(stats, budgets, options, progress=progressed)
    for file, plan in zip(files, plans, strict=True):
        put(file, plan.to_bytes())
        if file != STDOUT and not as_json:
            click.echo(plan.summary())
            log(f"wrote {file}")
    if as_json:
        made = [{"file": str(f), "plan": p.to_dict()} for f, p in zip(files, plans, strict=True)]
        print_json({"plans": made} if several else made[0])


@contextmanager
def _levels() -> Iterator[Callable[[int, int], None]]:
    """A bar of the levels that are searched, each search's from the beginning."""
    from tqdm import tqdm

    with tqdm(desc="compile", unit="level", leave=False, disable=not progress()) as bar:

        def show(level: int, levels: int) -> None:
            bar.total, bar.n = levels, level - 1
            bar.refresh()

        yield show
