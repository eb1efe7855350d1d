"""The `layercache` command. Results go to stdout, everything else to stderr.

Exit codes: 0 success, 1 failure, 2 wrong usage, 3 a plan or statistics belong to another model,
4 a quality gate failed, 130 interrupted. Libraries are imported inside the commands, so that
`inspect`, `merge` and `compile` work, and start fast, without torch.
"""

from __future__ import annotations

from pathlib import Path

import click

from layercache.cli._compiling import compile_command
from layercache.cli._export import export
from layercache.cli._files import (
    ANY_FILE,
    PLAN_FILE,
    STATISTICS,
    STATS_FILE,
    kind_of,
    load_shared,
)
from layercache.cli._model import Model, model_options
from layercache.cli._options import (
    FILE_OR_FOLDER,
    FOLDER,
    STEPS,
    Commands,
    Failure,
    expand_folders,
    json_option,
    log,
    parse_groups,
    parse_shard,
    parse_size,
    print_json,
    progress,
    prompts_option,
    read_prompts,
    remove_parts,
)
from layercache.cli._out import OUT_FILE, OUT_FOLDER, STDOUT, put
from layercache.cli._running import evaluate, refine
from layercache.cli._sharing import bundle, explore, push
from layercache.cli._trial import trial
from layercache.errors import LayerCacheError
from layercache.paying import paying
from layercache.plan import Plan
from layercache.stats import CalibrationStats, merge_all


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="layercache-flow", prog_name="layercache")
def main() -> None:
    """Calibrate a flow-matching model once, compile a caching plan for any budget, and run it."""


for _command in (compile_command, refine, evaluate, explore, bundle, push, export, trial):
    main.add_command(_command)


@main.command()
@click.option(
    "--out", type=OUT_FOLDER, default=Path("out"), show_default=True, help="Folder to write."
)
@click.option("--weights", type=FOLDER, hidden=True, help="Other reference weights.")
@json_option
def demo(out: Path, weights: Path | None, as_json: bool) -> None:
    """Do the whole job on the shipped reference model, and compare it with other methods."""
    from layercache.evaluation.demo import run_demo

    result = run_demo(out, weights=weights, log=log, progress=progress())
    if as_json:
        print_json(result.comparison.to_dict() | {"files": [str(f) for f in result.files]})
        return
    click.echo(result.comparison.table())
    click.echo(f"\nwrote {', '.join(file.name for file in result.files)} to {out}/")
    log(f"took {result.seconds:.0f} s; open {out / 'report.html'}")


@main.command()
@model_options()
@prompts_option()
@click.option("--steps", type=STEPS, default=50, show_default=True)
@click.option(
    "--component",
    default="transformer",
    show_default=True,
    help="Which of two transformers, such as transformer_2 of Wan 2.2.",
)
@click.option(
    "--groups",
    callback=parse_groups,
    help='A number, "blocks" (one a block), ranges such as "0:4,4:28,28:32", "auto" or "auto:N"; 0 '
    "for plans of whole steps alone.  [default: 4, or 0 where the model has no adapter]",
)
@click.option("--lags", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--mode",
    type=click.Choice(["replay", "residual"]),
    default="replay",
    show_default=True,
    help="Measure velocity deltas, or let residuals stand in for them (quick).",
)
@click.option(
    "--probes",
    type=click.IntRange(min=0),
    help="Perturbed runs a batch that measure how errors grow.  [default: 6, residual mode: 0]",
)
@click.option("--max-memory", callback=parse_size, help="Bytes above the model, such as 12GB.")
@click.option("--shard", callback=parse_shard, help="i/n: only the i-th (from 0) of n parts.")
@click.option("--parts", type=FOLDER, help="Folder of finished prompts; default: OUT.parts.")
@click.option("--out", type=OUT_FILE, default=Path("stats.npz"), show_default=True)
@json_option
def calibrate(
    model: Model,
    prompt_file: Path | None,
    count: int | None,
    steps: int,
    component: str,
    groups: str | None,
    lags: int,
    seed: int,
    batch_size: int,
    mode: str,
    probes: int | None,
    max_memory: int | None,
    shard: tuple[int, int] | None,
    parts: Path | None,
    out: Path,
    as_json: bool,
) -> None:
    """Measure a model; one statistics file serves every later budget.

    Every prompt is kept in a folder as soon as it is measured, and a run that was killed goes on
    where it stopped. Under `torchrun` or `accelerate launch` the processes share the prompts. With
    --shard nothing but the folder is written: `layercache merge FOLDER` joins it.
    """
    from layercache.calibration import calibrate as run
    from layercache.calibration.sharding import is_main_process, local_device

    if "num_inference_steps" in model.call:
        raise click.UsageError("--call: leave 'num_inference_steps' out; --steps says it")
    prompts = read_prompts(prompt_file, model.name, "calibration", count or 8, limit=count)
    pipe = model.load(local_device())
    arguments = model.arguments(pipe)
    named = Path("stats.npz") if out == STDOUT else out
    folder = parts or named.with_name(f"{named.name}.parts")
    main_process = is_main_process()
    stats = run(
        pipe,
        prompts,
        num_inference_steps=steps,
        component=component,
        groups=groups,
        lags=lags,
        seed=seed,
        batch_size=batch_size,
        mode=mode,
        probes=probes,
        max_memory=max_memory,
        shard=shard,
        parts=folder,
        call_kwargs=arguments,
        progress=progress(),
        log=log if main_process else lambda text: None,
    )
    if not main_process:
        return
    if shard is not None:
        _print_stats(stats, as_json, folder)
        return
    put(out, stats.to_bytes())
    if parts is None:
        remove_parts(folder, stats.prompt_ids)
    _print_stats(stats, as_json, out)


@main.command()
@click.argument("files", nargs=-1, required=True, type=FILE_OR_FOLDER)
@click.option("--out", type=OUT_FILE, default=Path("stats.npz"), show_default=True)
@json_option
def merge(files: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Join statistics of the same model and setting from several runs or machines.

    A folder stands for all statistics files in it.
    """
    stats = merge_all([CalibrationStats.load(file) for file in expand_folders(files)])
    put(out, stats.to_bytes())
    _print_stats(stats, as_json, out)


@main.command()
@click.argument("file", type=ANY_FILE)
@json_option
def inspect(file: Path, as_json: bool) -> None:
    """Show a plan, a set of plans or a statistics file."""
    if kind_of(file) == STATISTICS:
        _print_stats(CalibrationStats.load(file), as_json, file)
        return
    shared = load_shared(file)
    if as_json:
        print_json(
            {"file": str(file), "plan" if isinstance(shared, Plan) else "set": shared.to_dict()}
        )
    else:
        click.echo(shared.summary())


@main.command()
@click.argument("plan_file", type=PLAN_FILE)
@click.option("--stats", "stats_file", type=STATS_FILE, help="Check against statistics instead.")
@model_options()
@json_option
def check(plan_file: Path, stats_file: Path | None, model: Model, as_json: bool) -> None:
    """Say whether a plan fits a model and the run that it is for; exit code 3 where it does not.

    A run is begun with the plan's own call, and --call over it, and stopped before it computes.
    """
    plan = Plan.load(plan_file)
    if stats_file is not None:
        stats = CalibrationStats.load(stats_file)
        warnings = plan.check(stats.model, stats.setting)
    else:
        from layercache.runtime import check_run

        pipe = model.load()
        arguments = {"prompt": ""} | model.arguments(pipe, plan)
        try:
            warnings = check_run(pipe, plan, arguments)
        except LayerCacheError:
            raise
        except (TypeError, ValueError) as error:
            # Such as an image, which no plan can hold.
            raise Failure(
                f"{type(pipe).__name__} could not be called ({error}): give what it needs by --call"
            ) from error
    if as_json:
        print_json({"fits": True, "warnings": warnings})
        return
    click.echo(f"{plan_file} fits {plan.model.class_name}")
    for warning in warnings:
        click.echo(f"warning: {warning}")


def _print_stats(stats: CalibrationStats, as_json: bool, file: Path) -> None:
    if file == STDOUT:
        return
    if not as_json:
        click.echo(stats.summary())
        if stats.num_groups and stats.num_steps > 1:
            click.echo(paying(stats).table())
        log(f"file: {file}")
        return
    print_json(
        {
            "file": str(file),
            "mode": stats.mode,
            "prompts": stats.num_prompts,
            "steps": stats.num_steps,
            "groups": [group.name for group in stats.groups],
            "lags": stats.max_lag,
            "group_ms": stats.group_ms.tolist(),
            "rest_ms": stats.rest_ms,
            "overhead_ms": stats.overhead_ms,
            "model": stats.model,
            "setting": stats.setting,
        }
    )
