"""A publisher's whole job: calibrate a model, compile plans, put them beside the weights.

    python examples/publish.py MODEL_FOLDER prompts.txt --steps 28 --call '{"height": 1024}'

With `--push you/model` the plans also go to that repository of the Hugging Face hub, with a
section in its model card.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from layercache import PlanSet, pareto
from layercache.calibration import calibrate
from layercache.runtime import check_run

BUDGETS = ["1.37x", "2x", "3x"]


def main(arguments: Sequence[str] | None = None) -> PlanSet:
    """Publish; returns the plans."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder that diffusers saved")
    parser.add_argument("prompts", type=Path, help="one a line; four to sixteen")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--call", type=json.loads, default={}, help="of the pipeline, as JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--push", metavar="REPOSITORY")
    parser.add_argument("--prompts-license", default="CC0-1.0")
    options = parser.parse_args(arguments)

    pipe = DiffusionPipeline.from_pretrained(options.model, dtype="auto").to(options.device)
    prompts = options.prompts.read_text(encoding="utf-8").split("\n")
    stats = calibrate(
        pipe,
        [prompt.strip() for prompt in prompts if prompt.strip()],
        num_inference_steps=options.steps,
        call_kwargs=options.call,
    )
    plans = PlanSet(plans=pareto(stats, BUDGETS))
    for plan in plans.plans:
        run = {"prompt": prompts[0], "num_inference_steps": options.steps, **options.call}
        for warning in check_run(pipe, plan, run):
            print(f"warning: {warning}")
    print(plans.summary())
    print(f"wrote {plans.save_pretrained(options.model)}")
    if options.push:
        print(plans.push_to_hub(options.push, prompts_license=options.prompts_license))
    return plans


if __name__ == "__main__":
    main()
