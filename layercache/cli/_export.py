"""`layercache export`: a plan in the files of other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from layercache.cli._files import PLAN_FILE
from layercache.cli._options import REFERENCE, json_option, log, print_json
from layercache.cli._out import OUT_FILE, OUT_FOLDER, STDOUT, put
from layercache.errors import LayerCacheError, PlanError, UnsupportedModelError
from layercache.plan import Plan


@click.command()
@click.argument("plan_file", type=PLAN_FILE)
@click.argument("model", required=False)
@click.option("--scheduler", type=OUT_FOLDER, help="Folder for a scheduler that is the plan.")
@click.option("--cache-dit", type=OUT_FILE, help="File for a step mask of cache-dit.")
@json_option
def export(
    plan_file: Path,
    model: str | None,
    scheduler: Path | None,
    cache_dit: Path | None,
    as_json: bool,
) -> None:
    """Write a plan of whole steps as a diffusers scheduler, or any plan as cache-dit's step mask.

    MODEL is the pipeline whose scheduler the written one replaces, a diffusers model id or a local
    folder: with it the noise levels of every run are compared with the plan's. What the other
    program cannot hold of the plan is said.
    """
    if scheduler is None and cache_dit is None:
        raise click.UsageError("say what to write: --scheduler FOLDER, --cache-dit FILE, or both")
    if as_json and cache_dit == STDOUT:
        raise click.UsageError("--cache-dit - and --json both want stdout: name a file")
    plan = Plan.load(plan_file)
    written: dict[str, Any] = {}
    if scheduler is not None:
        from layercache.runtime import LayerCacheScheduler

        base = None if model is None else scheduler_of(model)
        try:
            made = LayerCacheScheduler.from_plan(plan, base)
        except UnsupportedModelError as error:
            raise LayerCacheError(f"{error}; here: name its pipeline as MODEL") from error
        made.save_pretrained(scheduler)
        written["scheduler"] = {"folder": str(scheduler), "lost": []}
    if cache_dit is not None:
        config, lost = cache_dit_config(plan)
        text = json.dumps({"cache_config": config})
        put(cache_dit, (text + "\n").encode())
        written["cache_dit"] = {"file": str(cache_dit), "lost": lost}
    if as_json:
        print_json(written)
        return
    for part in written.values():
        # What was written to stdout is all that stands there.
        say = log if cache_dit == STDOUT else click.echo
        say(f"wrote {part.get('folder') or part['file']}")
        for text in part["lost"]:
            log(f"lost: {text}")


def cache_dit_config(plan: Plan) -> tuple[dict[str, Any], list[str]]:
    """The fields of cache-dit's `DBCacheConfig` for a plan's steps, and what of the plan they lack.

    One block is the least that cache-dit computes at every step.

    Raises:
        PlanError: The plan skips no step, or the model is called more than twice a step.
    """
    if all(plan.run_steps):
        raise PlanError(
            "the plan skips no step, and cache-dit's masks know nothing else: compile one with "
            "units=('step',) (--units step)"
        )
    if plan.branches > 2:
        raise PlanError(
            f"the plan's model is called {plan.branches} times a step, and cache-dit counts one or "
            "two: its mask cannot be followed"
        )
    lost = [
        "skipped steps compute the first transformer block, so they are not free",
        "the residual of the last computed step is repeated; what the plan foretells of quality "
        "does not hold",
    ]
    unit = plan.step_unit
    taps = sum(map(bool, unit.taps or ())) if unit is not None else 0
    if taps:
        lost.append(f"the taps of {taps} steps")
    cached = sum(sum(plan.schedules[group.name].cached) for group in plan.groups)
    if cached:
        lost.append(f"{cached} cached cells of groups, which are computed")
    config = {
        "Fn_compute_blocks": 1,
        "Bn_compute_blocks": 0,
        "max_warmup_steps": 0,
        "enable_separate_cfg": plan.branches == 2,
        "num_inference_steps": plan.num_steps,
        "steps_computation_mask": [int(run) for run in plan.run_steps],
        "steps_computation_policy": "static",
    }
    return config, lost


def scheduler_of(name: str) -> Any:
    """The scheduler of a pipeline, without its models.

    Raises:
        LayerCacheError: There is none.
    """
    if name == REFERENCE:
        from layercache.reference import load_pipeline

        return load_pipeline().scheduler
    import diffusers

    try:
        if not Path(name).is_dir() and name.count("/") != 1:
            raise OSError("there is no such folder")
        config = diffusers.DiffusionPipeline.load_config(name)
        kind = getattr(diffusers, config["scheduler"][1])
        return kind.from_pretrained(name, subfolder="scheduler")
    except (AttributeError, KeyError, OSError, ValueError) as error:
        raise LayerCacheError(
            f"cannot load the scheduler of {name!r} ({error}); give a diffusers model id or a "
            f"local folder of a pipeline, or {REFERENCE!r}"
        ) from error
