"""The `layercache` command. Results go to stdout, everything else to stderr.

Exit codes: 0 success, 1 failure, 2 wrong usage, 3 a plan or statistics belong to another model,
4 a quality gate failed. Libraries are imported inside the commands, so that `inspect`, `merge` and
`compile` work, and start fast, without torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from layercache.cli_options import (
    FILE_OR_FOLDER,
    FOLDER,
    PATH,
    Commands,
    GateFailed,
    expand_folders,
    json_option,
    load_pipe,
    parse_budget,
    parse_shard,
    parse_size,
    pipe_options,
    read_prompts,
    remove_parts,
)
from layercache.plan import Budget, Plan
from layercache.stats import CalibrationStats, merge_all


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="layercache-flow", prog_name="layercache")
def main() -> None:
    """Calibrate a flow-matching model once, compile a caching plan for any budget, and run it."""


@main.command()
@click.option("--out", type=FOLDER, default=Path("out"), show_default=True, help="Folder to write.")
@click.option("--weights", type=FOLDER, hidden=True, help="Other reference weights.")
@json_option
def demo(out: Path, weights: Path | None, as_json: bool) -> None:
    """Do the whole job on the shipped reference model, and compare it with other methods."""
    from layercache.evaluation.demo import run_demo

    result = run_demo(out, weights=weights, log=_log, progress=_progress())
    if as_json:
        _print_json(result.comparison.to_dict() | {"files": [str(f) for f in result.files]})
        return
    click.echo(result.comparison.table())
    click.echo(f"\nwrote {', '.join(file.name for file in result.files)} to {out}/")
    _log(f"took {result.seconds:.0f} s; open {out / 'report.html'}")


@main.command()
@pipe_options
@click.option("--prompts", "prompt_file", type=PATH, help="A text file with one prompt a line.")
@click.option("--count", type=click.IntRange(min=1), help="Use only the first prompts.")
@click.option("--steps", type=click.IntRange(min=1), default=50, show_default=True)
@click.option(
    "--groups",
    default="4",
    show_default=True,
    help='A number, "blocks" (one a block), ranges such as "0:4,4:28,28:32", "auto" or "auto:N".',
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
@click.option("--out", type=PATH, default=Path("stats.npz"), show_default=True)
@json_option
def calibrate(
    pipe_name: str,
    weights: Path | None,
    device: str | None,
    dtype: str,
    call_kwargs: dict[str, Any],
    prompt_file: Path | None,
    count: int | None,
    steps: int,
    groups: str,
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

    prompts = read_prompts(prompt_file, pipe_name, "calibration", count or 8, limit=count)
    place = device or local_device()
    pipe, arguments = load_pipe(pipe_name, weights, place, dtype, call_kwargs)
    folder = parts or out.with_name(f"{out.name}.parts")
    main_process = is_main_process()
    stats = run(
        pipe,
        prompts,
        num_inference_steps=steps,
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
        progress=_progress(),
        log=_log if main_process else lambda text: None,
    )
    if not main_process:
        return
    if shard is not None:
        _print_stats(stats, as_json, folder)
        return
    stats.save(out)
    if parts is None:
        remove_parts(folder, stats.prompt_ids)
    _print_stats(stats, as_json, out)


@main.command()
@click.argument("files", nargs=-1, required=True, type=FILE_OR_FOLDER)
@click.option("--out", type=PATH, default=Path("stats.npz"), show_default=True)
@json_option
def merge(files: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Join statistics of the same model and setting from several runs or machines.

    A folder stands for all statistics files in it.
    """
    stats = merge_all([CalibrationStats.load(file) for file in expand_folders(files)])
    stats.save(out)
    _print_stats(stats, as_json, out)


@main.command("compile")
@click.argument("stats_file", type=PATH)
@click.option(
    "--budget",
    callback=parse_budget,
    required=True,
    help='A speedup such as "1.37x", or a share of the compute such as 0.73.',
)
@click.option("--solver", default="dp", show_default=True)
@click.option(
    "--units",
    default="step,groups",
    show_default=True,
    help="What may be cached: step, groups, or both with a comma.",
)
@click.option(
    "--gains",
    type=click.Choice(["trajectory", "cell", "unit", "none"]),
    default="trajectory",
    show_default=True,
)
@click.option("--power", type=float, default=1.0, show_default=True, help="Above 1: avoid peaks.")
@click.option("--max-cache-bytes", type=click.IntRange(min=0), help="Limit for one image.")
@click.option("--out", type=PATH, default=Path("plan.json"), show_default=True)
@json_option
def compile_command(
    stats_file: Path,
    budget: Budget,
    solver: str,
    units: str,
    gains: str,
    power: float,
    max_cache_bytes: int | None,
    out: Path,
    as_json: bool,
) -> None:
    """Compile a plan for a budget from a statistics file. Needs no torch and no GPU."""
    from layercache.compile import compile_plan

    plan = compile_plan(
        CalibrationStats.load(stats_file),
        budget,
        solver=solver,
        units=tuple(unit.strip() for unit in units.split(",") if unit.strip()),
        gains=gains,
        power=power,
        max_cache_bytes=max_cache_bytes,
    )
    plan.save(out)
    if as_json:
        _print_json({"file": str(out), "plan": plan.to_dict()})
    else:
        click.echo(plan.summary())
        _log(f"wrote {out}")


@main.command()
@click.argument("file", type=PATH)
@json_option
def inspect(file: Path, as_json: bool) -> None:
    """Show a plan or a statistics file."""
    with open(file, "rb") as stream:
        is_archive = stream.read(2) == b"PK"
    if is_archive:
        _print_stats(CalibrationStats.load(file), as_json, file)
        return
    plan = Plan.load(file)
    if as_json:
        _print_json({"file": str(file), "plan": plan.to_dict()})
    else:
        click.echo(plan.summary())


@main.command()
@click.argument("plan_file", type=PATH)
@click.option("--stats", "stats_file", type=PATH, help="Check against statistics instead.")
@pipe_options
@json_option
def check(
    plan_file: Path,
    stats_file: Path | None,
    pipe_name: str,
    weights: Path | None,
    device: str | None,
    dtype: str,
    call_kwargs: dict[str, Any],
    as_json: bool,
) -> None:
    """Say whether a plan fits a model; exit code 3 where it does not."""
    plan = Plan.load(plan_file)
    if stats_file is not None:
        stats = CalibrationStats.load(stats_file)
        warnings = plan.check(stats.model, stats.setting)
    else:
        from layercache.models.fingerprint import model_fingerprint, setting_of

        pipe, arguments = load_pipe(pipe_name, weights, device, dtype, call_kwargs)
        arguments = {"num_inference_steps": plan.num_steps} | arguments
        warnings = plan.check(model_fingerprint(pipe.transformer), setting_of(pipe, arguments))
    if as_json:
        _print_json({"fits": True, "warnings": warnings})
        return
    click.echo(f"{plan_file} fits {plan.model.class_name}")
    for warning in warnings:
        click.echo(f"warning: {warning}")


@main.command("eval")
@click.argument("plan_file", type=PATH)
@pipe_options
@click.option("--prompts", "prompt_file", type=PATH, help="A text file with one prompt a line.")
@click.option("--count", type=click.IntRange(min=1), help="Use only the first prompts.")
@click.option("--seed", default=2, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--min-psnr", type=float, help="Exit with 4 if the mean PSNR in dB is lower.")
@click.option("--min-speedup", type=float, help="Exit with 4 if the measured speedup is lower.")
@click.option("--out", type=FOLDER, help="Also write pictures, results.json and report.html there.")
@json_option
def evaluate(
    plan_file: Path,
    pipe_name: str,
    weights: Path | None,
    device: str | None,
    dtype: str,
    call_kwargs: dict[str, Any],
    prompt_file: Path | None,
    count: int | None,
    seed: int,
    batch_size: int,
    repeats: int,
    min_psnr: float | None,
    min_speedup: float | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure a plan's speed and fidelity beside two controls: uniform skipping, fewer steps."""
    from layercache.evaluation.evaluate import evaluate_plan

    plan = Plan.load(plan_file)
    prompts = read_prompts(prompt_file, pipe_name, "held-out", count or 16, limit=count)
    pipe, arguments = load_pipe(pipe_name, weights, device, dtype, call_kwargs)
    comparison = evaluate_plan(
        pipe,
        plan,
        prompts,
        call_kwargs=arguments,
        seed=seed,
        batch_size=batch_size,
        repeats=repeats,
        out=out,
        progress=_progress(),
    )
    row = comparison.rows[0]
    failures = [
        f"{label} is {value:.2f}{unit}, below the gate of {gate:.2f}{unit}"
        for label, value, gate, unit in (
            ("mean PSNR", row.psnr_mean, min_psnr, " dB"),
            ("measured speedup", row.speedup_measured, min_speedup, "x"),
        )
        if gate is not None and value < gate
    ]
    if as_json:
        _print_json(comparison.to_dict() | {"gate_failures": failures})
    else:
        click.echo(comparison.table())
    if failures:
        raise GateFailed("; ".join(failures))


@main.command()
@click.option(
    "--scenario",
    type=click.Choice(["main", "second", "both"]),
    default="both",
    show_default=True,
    help="50 steps with guidance, 28 steps without, or one after the other.",
)
@click.option("--quick", is_flag=True, help="Few prompts and settings; a few minutes.")
@click.option("--methods", help="Only these methods, with commas between; the default is all.")
@click.option("--rounds", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--clock",
    type=click.Choice(["wall", "cpu"]),
    default="wall",
    show_default=True,
    help="Read times from processor time on a machine that others use as well.",
)
@click.option("--lpips", type=FOLDER, help="Folder with LPIPS weights (never downloaded).")
@click.option("--results", type=FOLDER, help="Folder for RESULTS.md and results.json.")
@click.option("--ablation", is_flag=True, help="Compare LayerCache's own parts instead.")
@click.option(
    "--out",
    type=FOLDER,
    default=Path("out/bench"),
    show_default=True,
    help="Everything is kept here; a stopped bench goes on from it.",
)
@click.option("--weights", type=FOLDER, hidden=True, help="Other reference weights.")
@json_option
def bench(
    scenario: str,
    quick: bool,
    methods: str | None,
    rounds: int,
    clock: Any,
    lpips: Path | None,
    results: Path | None,
    ablation: bool,
    out: Path,
    weights: Path | None,
    as_json: bool,
) -> None:
    """Compare LayerCache with every rival at equal measured speed, on the reference model."""
    from dataclasses import replace

    from layercache.evaluation.bench.run import run_bench
    from layercache.evaluation.bench.scenario import MAIN, QUICK, SCENARIOS, BenchSize

    size = replace(QUICK if quick else BenchSize(), rounds=rounds)
    chosen = [MAIN] if quick and scenario == "both" else None
    chosen = chosen or [s for name, s in SCENARIOS.items() if scenario in (name, "both")]
    if ablation:
        from layercache.evaluation.bench.ablation import run_ablation

        table = run_ablation(out, chosen[0], size, weights=weights, results=results, log=_log)
        if as_json:
            _print_json(table.to_dict())
        else:
            click.echo(table.text())
        return
    found = run_bench(
        out,
        chosen,
        size,
        methods=methods.split(",") if methods else None,
        weights=weights,
        lpips=lpips,
        results=results,
        clock=clock,
        log=_log,
        progress=_progress(),
    )
    if as_json:
        _print_json(found.to_dict() | {"files": [str(file) for file in found.files]})
        return
    from layercache.evaluation.bench.tables import table as table_of

    for result in found.results:
        click.echo(f"{result.scenario.title}\n{table_of(result)}\n")
    _log(f"took {found.seconds:.0f} s; open {out / 'report.html'}")


def _print_stats(stats: CalibrationStats, as_json: bool, file: Path) -> None:
    if not as_json:
        click.echo(stats.summary())
        _log(f"file: {file}")
        return
    _print_json(
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


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1, allow_nan=False))


def _log(text: str) -> None:
    click.echo(text, err=True)


def _progress() -> bool:
    """Progress bars are for people who watch, not for log files."""
    return sys.stderr.isatty()
