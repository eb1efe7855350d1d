"""Commands that choose plans and hand them on: `explore`, `bundle` and `push`."""

from __future__ import annotations

from pathlib import Path

import click

from layercache.cli._files import PLAN_FILE, SHARED_FILE, STATS_FILE, load_shared
from layercache.cli._options import FOLDER, json_option, log, print_json
from layercache.cli._out import OUT_FILE, STDOUT, put
from layercache.errors import LayerCacheError
from layercache.plan import Plan
from layercache.plan_set import PlanSet
from layercache.stats import CalibrationStats


@click.command()
@click.argument("stats_file", type=STATS_FILE)
@click.option(
    "--evaluation",
    "evaluations",
    type=FOLDER,
    multiple=True,
    help="A folder of `eval --out`: shown beside what is foretold. Any number of times.",
)
@click.option("--out", type=OUT_FILE, default=Path("explore.html"), show_default=True)
@json_option
def explore(stats_file: Path, evaluations: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Write one HTML page on which to choose a plan. Needs no torch and no GPU."""
    from layercache.evaluation.explore import explore_page

    page = explore_page(CalibrationStats.load(stats_file), evaluations=evaluations)
    put(out, page.encode())
    if as_json:
        print_json({"file": str(out)})
    elif out != STDOUT:
        log(f"open {out} in a browser")


@click.command()
@click.argument("plan_files", nargs=-1, required=True, type=PLAN_FILE)
@click.option("--out", type=OUT_FILE, default=Path(PlanSet.FILE_NAME), show_default=True)
@json_option
def bundle(plan_files: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Put plans of one model into one file, of which each run takes the one made for it."""
    plans = PlanSet.from_dict(
        {"schema_version": 1, "plans": [Plan.load(file).to_dict() for file in plan_files]}
    )
    put(out, plans.to_bytes())
    if as_json:
        print_json({"file": str(out), "plans": len(plans.plans)})
    elif out != STDOUT:
        click.echo(plans.summary())


@click.command()
@click.argument("plan_file", type=SHARED_FILE)
@click.argument("repository")
@click.option("--subfolder", help="Folder of the repository.")
@click.option("--revision", help="Branch.")
@click.option("--message", help="Of the commit.")
@click.option("--create-pr", is_flag=True, help="Open a pull request.")
@click.option("--private", is_flag=True, help="Where the repository is made by this.")
@click.option("--prompts-license", help="Licence of the calibration prompts, for the card.")
@json_option
def push(
    plan_file: Path,
    repository: str,
    subfolder: str | None,
    revision: str | None,
    message: str | None,
    create_pr: bool,
    private: bool,
    prompts_license: str | None,
    as_json: bool,
) -> None:
    """Put a plan, or a set, into a repository of the Hugging Face hub, with a card section.

    The token is that of `hf auth login` or of the variable HF_TOKEN.
    """
    if Path(repository).is_file():
        raise click.UsageError(
            f"REPOSITORY is the file {repository}: name a repository, owner/name"
        )
    shared = load_shared(plan_file)
    address = shared.push_to_hub(
        repository,
        subfolder=subfolder,
        revision=revision,
        commit_message=message,
        create_pr=create_pr,
        private=private or None,
        prompts_license=prompts_license,
        picture=_picture(shared),
    )
    if as_json:
        print_json({"commit": address})
    else:
        click.echo(address)


def _picture(shared: Plan | PlanSet) -> bytes | None:
    """A PNG of the plans, where matplotlib is installed."""
    from layercache.evaluation.plots import plan_heat_map

    plans = (shared,) if isinstance(shared, Plan) else shared.plans
    try:
        return plan_heat_map({f"{p.num_steps} steps, {p.predicted.speedup:.2f}x": p for p in plans})
    except LayerCacheError as error:
        log(f"no picture for the card: {error}")
        return None
