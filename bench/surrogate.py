"""How well the error model foretells the final error, and how exact its sketches are.

    python -m bench.surrogate [--model NAME] [--json] [--quick] [--plans N] [--parts FOLDER]

Random schedules (skipped steps, cached groups, both) at random budgets, predicted by reuse, by the
published predictor or by fitted taps, are run on validation prompts of a model. The
measured error is the mean squared difference of the final latent from the uncached one, its
logarithm averaged over prompts. Spearman's rank correlation with it:

- `spearman_replay`: of the error model's score, from statistics of replay mode.
- `spearman_residual`: the same from residual mode, which knows no growth of errors by default;
  `spearman_residual_probes` gives it that of replay mode.
- `spearman_prices`: of the sum of separable prices, on which solvers propose (replay mode).

Each also by kind of plan. `bias_db` says how much better plans of a kind are foretold than they
come out, in dB, and `scatter_db` how much that varies (standard deviation); `off_median_db` and
`off_most_db` are the median and the largest distance, either way. Then, from exact deltas and their
sketches:

- `sketch_error_median`: median relative error of ||delta||^2 over random predicted cells, for the
  default sketch size; `sketch_errors` has other sizes, and errors of inner products of deltas of
  two cells relative to the product of their norms.

Statistics are exact (a sketch as long as the vectors) unless said otherwise. `--parts` keeps them
for another run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

from bench.comparison.scenario import SCENARIOS, Scenario
from layercache import CalibrationStats, Plan
from layercache._fit_rows import rows_of
from layercache.calibration import calibrate
from layercache.calibration._sketch import CountSketch
from layercache.calibration.prompts import Batch, batches
from layercache.costs import STEP
from layercache.options import Options
from layercache.plan import Budget, Certificate
from layercache.prediction import ErrorModel, Fit, price
from layercache.runtime import apply_plan
from layercache.solver._solution import price_of

EXACT = 1 << 16
KINDS = (("step",), ("groups",), ("step", "groups"))
PREDICTORS = ("reuse", "published", "fitted")
SIZES = (256, 512, 1024, 2048)
DEFAULT_SIZE = 1024
CELLS = 4000
PREDICTIONS = ("replay", "residual", "residual_probes", "prices")

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A random schedule: what may be cached, how it is predicted, and what is computed (T, 1+G)."""

    kind: tuple[str, ...]
    predictor: str
    computed: BoolArray

    @property
    def options(self) -> Options:
        """Those of a plan that has this schedule."""
        return Options(units=self.kind, predictor=self.predictor)


def random_row(rng: np.random.Generator, active: BoolArray, share: float, gap: int) -> BoolArray:
    """Computed steps among the active ones, denser at one end or the other, `gap` apart at most."""
    steps = np.flatnonzero(active)
    tilt = np.exp(rng.uniform(-2, 2) * np.linspace(0, 1, len(steps)))
    count = max(1, round(share * len(steps)))
    chosen = {0} | set(rng.choice(len(steps), count, replace=False, p=tilt / tilt.sum()).tolist())
    row = np.zeros(len(active), dtype=bool)
    last = 0
    for position, step in enumerate(steps.tolist()):
        if position in chosen or step - last > gap:
            row[step], last = True, step
    return row


def candidate(stats: CalibrationStats, index: int, rng: np.random.Generator) -> Candidate:
    """The schedule of one index; its kind and predictor take turns, the rest is random."""
    kind, predictor = KINDS[index % 3], PREDICTORS[index // 3 % 3]
    share = float(rng.uniform(0.3, 0.9))
    run = np.ones(stats.num_steps, dtype=bool)
    gap = stats.max_lag // 2
    if "step" in kind:
        run = random_row(rng, run, share, gap)
    columns = [run]
    for _ in stats.groups:
        row = run
        if "groups" in kind:
            # Each group has a budget of its own around that of the plan.
            own = float(np.clip(share + rng.uniform(-0.25, 0.25), 0.15, 1.0))
            row = random_row(rng, run, own, gap)
        columns.append(row)
    return Candidate(kind, predictor, np.array(columns).T)


def fitted(stats: CalibrationStats, found: Candidate) -> Fit:
    """The schedule with its taps, scored by the error model."""
    return ErrorModel(stats, found.predictor).fit(found.computed)


def summed_prices(stats: CalibrationStats, found: Candidate) -> float:
    """The schedule's sum of prices: what the solvers make small."""
    names = [STEP, *(group.name for group in stats.groups)]
    run, total = found.computed[:, 0], 0.0
    for unit in price(stats, found.kind, found.predictor):
        active = np.ones_like(run) if unit.kind == "step" else run
        total += price_of(unit.errors, found.computed[:, names.index(unit.name)], active)
    return total


def plan_of(stats: CalibrationStats, found: Candidate, fit: Fit) -> Plan:
    """The plan of a fitted schedule."""
    return Plan.of(
        stats,
        Budget(fraction=1.0),
        found.options,
        rows_of(stats, found.options, fit),
        psnr=None,
        certificate=Certificate(solver="random", objective="score", value=fit.score, starts=1),
        provenance={},
    )


def final_latents(pipe: Any, work: Sequence[Batch]) -> Tensor:
    """(P, N) latents after the last step."""
    found = []
    for batch in work:
        arguments = {**batch.arguments, "output_type": "latent", "return_dict": False}
        generators = arguments["generator"]
        single = not isinstance(generators, list)
        arguments["generator"] = (
            generators.clone_state() if single else [g.clone_state() for g in generators]
        )
        with torch.no_grad():
            found.append(pipe(**arguments)[0].flatten(1).double())
    return torch.cat(found)


def sketch_errors(stats: CalibrationStats, seed: int = 0) -> dict[str, dict[str, float]]:
    """Relative errors of sketched deltas, by sketch size, from exact ones."""
    rng = np.random.default_rng(seed)
    sigmas = np.asarray(stats.sigmas, dtype=np.float64)
    rows = []
    for _ in range(CELLS):
        prompt, group = rng.integers(stats.num_prompts), rng.integers(stats.num_groups)
        base = int(rng.integers(2, stats.max_lag + 1))
        anchor = int(rng.integers(1, base))
        step = int(rng.integers(base, stats.num_steps))
        reach = (sigmas[step] - sigmas[step - anchor]) / (
            sigmas[step - anchor] - sigmas[step - base]
        )
        weight = float(rng.uniform(0, 1.2)) * reach
        reuse = stats.deltas[prompt, step, group, anchor - 1].astype(np.float64)
        rows.append(reuse + weight * (reuse - stats.deltas[prompt, step, group, base - 1]))
    exact = torch.tensor(np.array(rows))
    squares, pairs = (exact**2).sum(1), (exact * exact.roll(1, 0)).sum(1)
    norms = squares.sqrt() * squares.roll(1).sqrt()
    result = {}
    for size in SIZES:
        if size >= exact.shape[1]:
            continue
        short = CountSketch(exact.shape[1], size, seed)(exact).double()
        square = ((short**2).sum(1) / squares - 1).abs()
        inner = ((short * short.roll(1, 0)).sum(1) - pairs).abs() / norms
        result[str(size)] = {
            "squared_norm_median": float(square.median()),
            "squared_norm_p95": float(square.quantile(0.95)),
            "inner_product_median": float(inner.median()),
        }
    return result


def measure(
    scenario: Scenario, count: int, size: int, parts: Path, progress: bool
) -> dict[str, Any]:
    """All figures."""
    pipe, steps = scenario.load(), scenario.steps
    texts, call = scenario.prompts("calibration", size), scenario.arguments()
    arguments = {name: value for name, value in call.items() if name != "num_inference_steps"}
    common: dict[str, Any] = {
        "num_inference_steps": steps,
        "batch_size": 8,
        "sketch_size": EXACT,
        "call_kwargs": arguments,
        "progress": progress,
    }
    replay = calibrate(pipe, texts, parts=parts / "replay", **common)
    residual = calibrate(pipe, texts, mode="residual", parts=parts / "residual", **common)
    # Perturbed runs in residual mode would be those of replay mode, prompts and noise being equal.
    informed = replace(residual, amplification=replay.amplification)
    validation = batches(scenario.prompts("validation", size), 1, 8, call)
    reference = final_latents(pipe, validation)

    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for index in tqdm(range(count), desc="plans", disable=not progress):
        found = candidate(replay, index, rng)
        fit = fitted(replay, found)
        with apply_plan(pipe, plan_of(replay, found, fit)):
            error = (final_latents(pipe, validation) - reference).pow(2).mean(1).numpy()
        rows.append(
            {
                "kind": "+".join(found.kind),
                "predictor": found.predictor,
                "measured": float(np.log10(np.maximum(error, 1e-30)).mean()),
                "replay": fit.score,
                "residual": fitted(residual, found).score,
                "residual_probes": fitted(informed, found).score,
                "prices": summed_prices(replay, found),
            }
        )
    sketched = sketch_errors(replay)
    kinds = sorted({row["kind"] for row in rows})
    return {
        **{f"spearman_{name}": correlation(rows, name) for name in PREDICTIONS},
        "by_kind": {kind: of_kind([row for row in rows if row["kind"] == kind]) for kind in kinds},
        "plans": count,
        "calibration_prompts": size,
        "validation_prompts": size,
        "model": scenario.title,
        "steps": steps,
        "sketch_error_median": sketched[str(DEFAULT_SIZE)]["squared_norm_median"],
        "sketch_errors": sketched,
        "rows": rows,
    }


def of_kind(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Correlations of one kind of plan, and how far the score is from what was measured."""
    apart = [10 * (row["measured"] - row["replay"]) for row in rows]
    return {
        **{name: correlation(rows, name) for name in PREDICTIONS},
        "bias_db": float(np.mean(apart)),
        "scatter_db": float(np.std(apart)),
        "off_median_db": float(np.median(np.abs(apart))),
        "off_most_db": float(np.max(np.abs(apart))),
    }


def correlation(rows: Sequence[dict[str, Any]], name: str) -> float:
    """Spearman's rank correlation of a prediction with the measured error."""
    found = spearmanr([row[name] for row in rows], [row["measured"] for row in rows])
    return float(found.statistic)


def report(figures: dict[str, Any]) -> str:
    """The figures as a table for a person."""
    lines = [
        f"{figures['model']}: {figures['plans']} random plans, "
        f"{figures['calibration_prompts']} calibration and {figures['validation_prompts']} "
        "validation prompts; Spearman's correlation with the measured final error",
        f"  {'plans':<14}" + "".join(f"{name:>17}" for name in PREDICTIONS),
        f"  {'all':<14}" + "".join(f"{figures[f'spearman_{name}']:>17.3f}" for name in PREDICTIONS),
    ]
    for kind, values in figures["by_kind"].items():
        lines.append(
            f"  {kind:<14}"
            + "".join(f"{values[name]:>17.3f}" for name in PREDICTIONS)
            + f"   foretold {values['bias_db']:.1f} ({values['scatter_db']:.1f}) dB too well, "
            f"off by {values['off_median_db']:.1f}, at most {values['off_most_db']:.1f}"
        )
    lines.append("sketches against exact vectors, medians (and 95th percentile of ||delta||^2)")
    for size, errors in figures["sketch_errors"].items():
        lines.append(
            f"  S = {size:>4}   ||delta||^2 {100 * errors['squared_norm_median']:.2f} % "
            f"({100 * errors['squared_norm_p95']:.2f} %)   inner products "
            f"{100 * errors['inner_product_median']:.2f} % of the norms' product"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="a small run, for a smoke test")
    parser.add_argument("--plans", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--steps", type=int, help="those of the model's setting if not given")
    parser.add_argument("--model", choices=SCENARIOS, default="main")
    parser.add_argument("--parts", type=Path, help="folder that keeps the statistics")
    chosen = parser.parse_args()
    scenario, count, size = SCENARIOS[chosen.model], chosen.plans, chosen.prompts
    if chosen.quick:
        count, size = 9, 1
    steps = chosen.steps or (10 if chosen.quick else scenario.steps)
    with tempfile.TemporaryDirectory() as folder:
        parts = chosen.parts or Path(folder)
        figures = measure(
            replace(scenario, steps=steps), count, size, parts, progress=not chosen.json
        )
    print(json.dumps(figures) if chosen.json else report(figures))


if __name__ == "__main__":
    main()
