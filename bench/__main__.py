"""The benchmark: `python -m bench`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from bench.comparison.ablation import run_ablation
from bench.comparison.run import run_bench
from bench.comparison.scenario import MAIN, QUICK, SCENARIOS, BenchSize
from bench.comparison.tables import table as table_of
from layercache.cli._options import FOLDER, Failure, json_option, log, print_json, progress
from layercache.errors import LayerCacheError


@click.command()
@click.option(
    "--scenario",
    type=click.Choice([*SCENARIOS, "all"]),
    default="all",
    show_default=True,
    help="50 steps with guidance, 28 steps without, the second model, or one after the other.",
)
@click.option("--quick", is_flag=True, help="Few prompts and settings; a few minutes.")
@click.option("--methods", help="Only these methods, with commas between; the default is all.")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    help="Timed runs of every setting; 3 if not given, and 1 with --quick.",
)
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
    rounds: int | None,
    clock: Any,
    lpips: Path | None,
    results: Path | None,
    ablation: bool,
    out: Path,
    weights: Path | None,
    as_json: bool,
) -> None:
    """Compare LayerCache with every rival at equal measured speed, on the reference model."""
    size = QUICK if quick else BenchSize()
    size = size if rounds is None else replace(size, rounds=rounds)
    chosen = [MAIN] if quick and scenario == "all" else None
    chosen = chosen or [s for name, s in SCENARIOS.items() if scenario in (name, "all")]
    if ablation:
        table = run_ablation(out, chosen[0], size, weights=weights, results=results, log=log)
        if as_json:
            print_json(table.to_dict())
        else:
            click.echo(table.text())
        return
    try:
        found = run_bench(
            out,
            chosen,
            size,
            methods=methods.split(",") if methods else None,
            weights=weights,
            lpips=lpips,
            results=results,
            clock=clock,
            log=log,
            progress=progress(),
        )
    except LayerCacheError as error:
        raise Failure(str(error)) from error
    if as_json:
        print_json(found.to_dict() | {"files": [str(file) for file in found.files]})
        return
    for result in found.results:
        click.echo(f"{result.scenario.title}\n{table_of(result)}\n")
    log(f"took {found.seconds:.0f} s; open {out / 'report.html'}")


if __name__ == "__main__":
    bench(prog_name="python -m bench")
