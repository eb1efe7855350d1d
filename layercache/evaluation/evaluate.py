"""Measure one plan on any pipeline, beside the two controls that need no calibration."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from layercache.calibration.prompts import Prompt, batches
from layercache.evaluation._artifacts import write_artifacts
from layercache.evaluation._compare import Comparison, compare
from layercache.evaluation.methods import LayerCache, Method
from layercache.evaluation.peers import FewerSteps, Uniform
from layercache.evaluation.peers.uniform import uniform_steps
from layercache.plan import Plan


def evaluate_plan(
    pipe: Any,
    plan: Plan,
    prompts: Sequence[Prompt],
    *,
    call_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 1,
    repeats: int = 1,
    out: Path | None = None,
    progress: bool = True,
) -> Comparison:
    """Compare a plan with the uncached pipeline, and with controls that spend no more than it.

    Args:
        pipe: A pipeline that the plan fits.
        plan: The plan; the uncached run takes as many steps as it has.
        prompts: Captions, or mappings of pipeline arguments, that the plan was not calibrated on.
        call_kwargs: Pipeline arguments, such as guidance and resolution, as served.
        seed: With each prompt, it seeds the starting noise.
        batch_size: Prompts a pipeline call.
        repeats: Timed rounds a batch.
        out: Folder for pictures, `results.json` and `report.html`, where given. Of videos the
            pictures show a few frames; without a decoder latents are compared, and not shown.
        progress: Show a progress bar on stderr.

    Returns:
        The comparison; its first row is the plan's, at the target 1 / share of compute.

    Raises:
        ModelMismatchError: The plan is for another model or schedule.
    """
    steps, share = plan.num_steps, plan.predicted.compute_share
    arguments = {**(call_kwargs or {}), "num_inference_steps": steps}
    budget = max(1, int(steps * share + 1e-9))
    methods: list[Method] = [
        LayerCache(plan),
        Uniform(uniform_steps(steps, budget)),
        FewerSteps(budget, steps),
    ]
    target = round(1 / share, 2)
    work = batches(prompts, seed, batch_size, arguments)
    comparison = compare(pipe, work, {target: methods}, repeats=repeats, progress=progress)
    if out is not None:
        facts = {
            "Model": f"{plan.model.class_name}, {sum(plan.model.block_lists.values())} blocks",
            _kind(comparison): f"{len(prompts)}, {steps} steps each, seed {seed}",
            "Timing": f"batches of {comparison.batch_size}, warm, methods in turns, uncached "
            f"median {comparison.uncached_seconds:.2f} s a batch",
            "Machine": f"{platform.machine()}, torch {torch.__version__}",
        }
        plans = {target: plan}
        captions = [_caption(prompt, number) for number, prompt in enumerate(prompts, start=1)]
        write_artifacts(out, comparison, plans, captions, facts, title="LayerCache evaluation")
    return comparison


def _kind(comparison: Comparison) -> str:
    if not comparison.decoded:
        return "Latents"
    return "Videos" if comparison.references.ndim == 5 else "Images"


def _caption(prompt: Prompt, number: int) -> str:
    text = prompt if isinstance(prompt, str) else prompt.get("prompt")
    return text if isinstance(text, str) else f"prompt {number}"
