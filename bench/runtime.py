"""What the runtime costs, and whether it delivers what plans predict.

    python -m bench.runtime [--json] [--quick] [--weights FOLDER] [--repeats N]

- `overhead_us_per_block`: microseconds that a plan adds to one block's call, on a transformer of 64
  empty blocks, by what the group does at that step; the largest of them is the figure. Processor
  time of the calling thread, so that other programs do not count; the median of paired differences.
- `measured_over_predicted`: measured speedup over the plan's own prediction, on the reference model
  at batch 8; one figure a plan, the smallest of them counts. Wall time; every cached run stands
  between two uncached ones, and the median of the ratios to their mean is taken.
- `cache_bytes_ratio`: peak bytes held in those runs over the plan's prediction for eight images;
  the one that is farthest from 1.
- `models_ok`: supported models whose output a plan with exact residuals reproduces to 1e-5.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layercache import Plan, compile_plan
from layercache.calibration import calibrate
from layercache.models import Adapter, BlockList, model_fingerprint, register_adapter
from layercache.reference import call_arguments, load_pipeline, prompts
from layercache.reference.pipeline import WEIGHTS
from layercache.runtime import apply_plan
from tests.models.zoo import BUILDERS, build
from tests.runtime.harness import LoopPipeline, group, make_plan

BLOCKS = 64
BUDGETS = ("1.37x", "2x", "3x")


@dataclass(frozen=True)
class Size:
    """How much is run: steps and prompts of generations, repeats, timed calls, models."""

    steps: int = 20
    batch: int = 8
    repeats: int = 5
    timed: int = 400
    models: int | None = None
    budgets: tuple[str, ...] = BUDGETS


QUICK = Size(steps=5, batch=1, repeats=1, timed=3, models=2, budgets=("1.1x",))


class EmptyBlock(nn.Module):
    """Two streams and next to no work, so that a call's own cost is what is timed."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor
    ) -> tuple[Tensor, Tensor]:
        return encoder_hidden_states + temb, hidden_states + temb


class EmptyTransformer(nn.Module):
    """`BLOCKS` empty blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(EmptyBlock() for _ in range(BLOCKS))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        return_dict: bool = True,
    ) -> tuple[Tensor]:
        for block in self.transformer_blocks:
            encoder_hidden_states, hidden_states = block(
                hidden_states=hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                temb=timestep,
            )
        return (hidden_states,)


def overhead(repeats: int) -> dict[str, float]:
    """Microseconds a block that a plan adds, where the group is computed, measured or predicted."""
    both = ("hidden_states", "encoder_hidden_states")
    adapter = Adapter("EmptyTransformer", (BlockList("transformer_blocks", both, both[::-1]),))
    register_adapter(adapter)
    inputs = {
        "hidden_states": torch.zeros(1, 4, 8),
        "encoder_hidden_states": torch.zeros(1, 2, 8),
        "timestep": torch.zeros(1),
    }
    model = EmptyTransformer()
    pipe = LoopPipeline(model, inputs, guided=False)
    # Steps 0 and 1 compute without storing, step 2 stores, step 3 predicts.
    plan = make_plan(pipe, 4, [group("transformer_blocks", 0, BLOCKS, "###0")])
    latent = torch.zeros(32)
    added: dict[str, list[float]] = {
        "computed first": [], "computed": [], "measured": [], "predicted": [],
    }  # fmt: skip

    def timed() -> float:
        start = time.thread_time()
        model(**inputs)
        return time.thread_time() - start

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        for repeat in range(repeats):
            bare = timed()
            with apply_plan(pipe, plan):
                # The first run under a plan is traced.
                for traced in (True, False):
                    pipe.scheduler.set_timesteps(4)
                    for name, t in zip(added, pipe.scheduler.timesteps, strict=True):
                        gated = timed()
                        pipe.scheduler.step(torch.zeros(32), t, latent)
                        if repeat and not traced:
                            added[name].append(gated - bare)
    torch.set_num_threads(threads)
    return {name: 1e6 * statistics.median(found) / BLOCKS for name, found in added.items()}


def delivered(weights: Path, size: Size) -> dict[str, dict[str, float]]:
    """Measured speedup and bytes of compiled plans, over what the plans predict."""
    pipe = load_pipeline(weights)
    texts = prompts("calibration", size.batch)
    setting = call_arguments()
    fixed = {k: setting[k] for k in ("negative_prompt", "true_cfg_scale", "height", "width")}
    stats = calibrate(
        pipe, texts, num_inference_steps=size.steps, groups=4, lags=4, batch_size=size.batch,
        seed=0, call_kwargs=fixed, progress=False,
    )  # fmt: skip
    plans: dict[str, Plan] = {}
    for budget in size.budgets:
        plans[f"step {budget}"] = compile_plan(stats, budget, units=("step",))
        plans[f"groups {budget}"] = compile_plan(stats, budget, units=("groups",))

    def timed() -> float:
        arguments = call_arguments(list(range(size.batch)), num_inference_steps=size.steps)
        start = time.perf_counter()
        pipe(texts, **arguments)
        return time.perf_counter() - start

    speedups: dict[str, list[float]] = {name: [] for name in plans}
    bytes_ratios: dict[str, float] = {}
    timed()
    before = timed()
    for _ in range(size.repeats):
        for name, plan in plans.items():
            with apply_plan(pipe, plan) as run:
                cached = timed()
                report = run.report()
            after = timed()
            speedups[name].append((before + after) / 2 / cached)
            before = after
            if report.warnings:
                raise SystemExit(f"{name}: {report.warnings[0]}")
            bytes_ratios[name] = report.cache_bytes_seen / max(
                size.batch * plan.predicted.cache_bytes, 1
            )
    return {
        name: {
            "predicted": plan.predicted.speedup,
            "measured": statistics.median(speedups[name]),
            "measured_least": min(speedups[name]),
            "measured_most": max(speedups[name]),
            "measured_over_predicted": statistics.median(speedups[name]) / plan.predicted.speedup,
            "cache_bytes_ratio": bytes_ratios[name],
        }
        for name, plan in plans.items()
    }


def models_ok(size: Size) -> dict[str, bool]:
    """Whether exact residuals reproduce each supported model's output."""
    return {name: _reproduces(name) for name in list(BUILDERS)[: size.models]}


def _reproduces(name: str) -> bool:
    pipe = LoopPipeline(*build(name))
    lists: dict[str, int] = model_fingerprint(pipe.transformer)["block_lists"]
    plan = make_plan(pipe, 2, [group(n, 0, count, "#0") for n, count in lists.items()])
    with torch.no_grad():
        expected = pipe.call(0.7, None, "cond")
        with apply_plan(pipe, plan):
            pipe.scheduler.set_timesteps(2)
            for t in pipe.scheduler.timesteps:
                output = pipe.call(0.7, None, "cond")
                pipe.scheduler.step(output, t, torch.zeros_like(expected))
    return bool((output - expected).abs().max() < 1e-5 * expected.abs().max())


def main() -> None:
    """Run everything and print a table or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="reference model folder")
    parser.add_argument("--repeats", type=int, default=5, help="cached runs of every plan")
    parser.add_argument("--quick", action="store_true", help="a small run, for a smoke test")
    options = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    size = QUICK if options.quick else Size(repeats=options.repeats)
    costs = overhead(size.timed)
    plans = delivered(options.weights, size)
    models = models_ok(size)
    result: dict[str, Any] = {
        "overhead_us_per_block": max(costs.values()),
        "measured_over_predicted": min(p["measured_over_predicted"] for p in plans.values()),
        "cache_bytes_ratio": max(
            (p["cache_bytes_ratio"] for p in plans.values()), key=lambda r: abs(r - 1.0)
        ),
        "models_ok": sum(models.values()),
        "models": models,
        "overhead": costs,
        "plans": plans,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if options.json:
        json.dump(result, sys.stdout, indent=1)
        print()
        return
    for name, cost in costs.items():
        print(f"overhead where a group is {name:<14} {cost:6.2f} us a block")
    for name, p in plans.items():
        print(
            f"{name:<14} predicted {p['predicted']:.2f}x, measured {p['measured']:.2f}x "
            f"({p['measured_over_predicted']:.2f}), cache bytes {p['cache_bytes_ratio']:.3f}"
        )
    print(f"models reproduced: {sum(models.values())} of {len(models)}")


if __name__ == "__main__":
    main()
