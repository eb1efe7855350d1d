"""How well calibration foretells the final error, and how exact its sketches are.

    python benchmarks/surrogate.py [--json] [--quick] [--plans N] [--parts FOLDER]

Random schedules (skipped steps, cached groups, both) at random budgets, with no gains, unit gains
or per-cell gains, are run on validation prompts of the reference model; the measured error is the
mean squared difference of the final latent from the uncached one, its logarithm averaged over
prompts. Calibration prompts foretell it in three ways. Spearman's rank correlation with the
measured error:

- `spearman_velocity`: the objective of a plan, from velocity deltas (replay mode) with
  propagation.
- `spearman_residual`: the same from residual mode, which has no propagation by default;
  `spearman_residual_probes` gives it that of replay mode.
- `spearman_feature`: the sum over cells of the local feature error ||r_pred - r||^2 / ||r||^2, with
  r the unit's residual or, for a whole step, the velocity.

Each also by kind of plan, and with the final error that compilation predicts (errors added as
vectors) in place of the sum. Then, from exact vectors and their sketches:

- `sketch_error_median`: median relative error of ||delta||^2 over random predicted cells, for the
  default sketch size; `sketch_errors` has other sizes, and errors of inner products of deltas of
  two cells relative to the product of their norms.

Statistics are exact (a sketch as long as the vectors) unless said otherwise. `--parts` keeps them
for another run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

from layercache import CalibrationStats, Plan
from layercache.calibration import CountSketch, calibrate
from layercache.calibration.prompts import Batch, batches
from layercache.calibration.replay import ReplayableTransformer
from layercache.calibration.residual import ResidualSketches
from layercache.models import adapter_for, model_fingerprint
from layercache.models.pipelines import run_pipeline
from layercache.models.stepping import tapped_step
from layercache.plan import Budget, Certificate, ModelFingerprint, Predicted, UnitPlan
from layercache.reference import call_arguments, load_pipeline, prompts
from layercache.runtime import apply_plan
from layercache.solver import ScheduleProblem
from layercache.solver.gains import fit_gains, trajectory_error
from layercache.solver.pricing import STEP_NAME, price_units
from layercache.solver.problem import ScheduleSolution, build_solution

EXACT = 1 << 16
KINDS = (("step",), ("groups",), ("step", "groups"))
GAINS = ("none", "unit", "cell")
SIZES = (256, 512, 1024, 2048)
DEFAULT_SIZE = 1024
CELLS = 4000
PREDICTIONS = (
    "velocity",
    "residual",
    "residual_probes",
    "feature",
    "velocity_vector",
    "residual_vector",
)

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Candidate:
    """A random plan: its schedule, gains, and what it may cache."""

    kind: tuple[str, ...]
    gains: str
    share: float
    solution: ScheduleSolution
    values: tuple[FloatArray, ...]


def random_mask(rng: np.random.Generator, active: NDArray[np.bool_], share: float, gap: int) -> Any:
    """Refreshes among the active steps, denser at one end or the other, `gap` apart at most."""
    steps = np.flatnonzero(active)
    tilt = np.exp(rng.uniform(-2, 2) * np.linspace(0, 1, len(steps)))
    count = max(1, round(share * len(steps)))
    chosen = {0} | set(rng.choice(len(steps), count, replace=False, p=tilt / tilt.sum()).tolist())
    mask = np.zeros(len(active), dtype=bool)
    last = 0
    for position, step in enumerate(steps.tolist()):
        if position in chosen or step - last > gap:
            mask[step], last = True, step
    return mask


def candidate(stats: CalibrationStats, index: int, rng: np.random.Generator) -> Candidate:
    """The plan of one index; its kind and gains take turns, the rest is random."""
    kind, gains = KINDS[index % 3], GAINS[index // 3 % 3]
    units = tuple(unit.costs for unit in price_units(stats, kind, gains))
    problem = ScheduleProblem(
        sigmas=stats.sigmas, units=units, budget_ms=0.0, history=0 if gains == "none" else 2
    )
    share = float(rng.uniform(0.3, 0.9))
    run = np.ones(stats.num_steps, dtype=bool)
    gap = stats.max_lag // 2
    masks = []
    for unit in units:
        if unit.kind == "step":
            run = random_mask(rng, run, share, gap)
            masks.append(run)
        else:
            # Each group has a budget of its own around that of the plan.
            own = float(np.clip(share + rng.uniform(-0.25, 0.25), 0.15, 1.0))
            masks.append(random_mask(rng, run, own, gap))
    depths = [problem.history] * len(units)
    solution = build_solution(problem, masks, depths, solver="random", lower_bound=0.0)
    fit = fit_gains(stats, solution.units, gains)
    return Candidate(kind, gains, share, solution, fit.gains)


Delta = Callable[[str, int, int], FloatArray]
"""(unit, step, source) to (P, S), what reusing `source` at `step` changes."""


def summed(plan: Candidate, sigmas: FloatArray, delta: Delta, scale: Delta) -> float:
    """Sum over cells of the squared predicted change times `scale`, averaged over prompts."""
    total = 0.0
    for unit, gains in zip(plan.solution.units, plan.values, strict=True):
        for step in np.flatnonzero(unit.cached).tolist():
            a, b = int(unit.anchor[step]), int(unit.base[step])
            moved = delta(unit.name, step, a)
            if b >= 0:
                weight = gains[step] * (sigmas[step] - sigmas[a]) / (sigmas[a] - sigmas[b])
                moved = moved + weight * (moved - delta(unit.name, step, b))
            total += float(((moved**2).sum(-1) * scale(unit.name, step, a)).mean())
    return total


def objective(stats: CalibrationStats, plan: Candidate) -> float:
    """The plan's objective as these statistics price it: the squared errors of cells, added."""
    number = {group.name: index for index, group in enumerate(stats.groups)}
    euler = (np.diff(stats.sigmas) * stats.propagation) ** 2 / stats.numel

    def delta(unit: str, step: int, source: int) -> FloatArray:
        if unit == STEP_NAME:
            found = stats.velocities[:, source] - stats.velocities[:, step]
        else:
            found = stats.deltas[:, step, number[unit], step - source - 1]
        return found.astype(np.float64)

    return summed(plan, stats.sigmas, delta, lambda unit, step, source: euler[step])


def geometric(error: FloatArray) -> float:
    """Mean logarithm."""
    return float(np.log(np.maximum(error, 1e-30)).mean())


class Features:
    """Residuals and velocities of uncached runs, for the local feature error."""

    def __init__(self, pipe: Any, work: Sequence[Batch], stats: CalibrationStats) -> None:
        self.groups = {group.name: index for index, group in enumerate(stats.groups)}
        self.sigmas = np.asarray(stats.sigmas, dtype=np.float64)
        rows = [self._record(pipe, batch, stats) for batch in work]
        self.residuals = np.concatenate(rows).astype(np.float64)  # (P, T, G, S)
        self.velocities = np.asarray(stats.velocities, dtype=np.float64)

    def _record(self, pipe: Any, batch: Batch, stats: CalibrationStats) -> NDArray[np.float32]:
        adapter = adapter_for(pipe.transformer)
        replayable = ReplayableTransformer(pipe.transformer, adapter, stats.groups, 1)
        sketches = ResidualSketches(4096, 0, len(batch.ids))
        calls = 0

        def on_call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return replayable.record(calls - 1, args, kwargs)

        def on_step(index: int, velocity: Tensor, sample: Tensor) -> Tensor:
            nonlocal calls
            calls = 0
            sketches.add(replayable)
            return velocity

        replayable.on_call(on_call)
        try:
            with torch.no_grad(), tapped_step(pipe.scheduler, on_step):
                run_pipeline(pipe, batch.arguments)
        finally:
            replayable.remove()
        return np.stack(sketches.steps, axis=1)

    def error(self, plan: Candidate) -> float:
        """Sum over cells of the relative squared feature error, averaged over prompts."""

        def value(unit: str, step: int) -> FloatArray:
            if unit == STEP_NAME:
                return self.velocities[:, step]
            return self.residuals[:, step, self.groups[unit]]

        def delta(unit: str, step: int, source: int) -> FloatArray:
            return value(unit, source) - value(unit, step)

        def scale(unit: str, step: int, source: int) -> FloatArray:
            return 1 / (value(unit, step) ** 2).sum(-1)

        return summed(plan, self.sigmas, delta, scale)


def as_plan(pipe: Any, stats: CalibrationStats, found: Candidate) -> Plan:
    """The plan file of a candidate. Its figures are placeholders: nothing reads them here."""
    groups = {group.name: group for group in stats.groups}
    rows = []
    for unit, gains in zip(found.solution.units, found.values, strict=True):
        symbols = [
            "#" if unit.refresh[t] else "." if a < 0 else "0" if b < 0 else _span(int(a - b))
            for t, (a, b) in enumerate(zip(unit.anchor, unit.base, strict=True))
        ]
        group = groups.get(unit.name)
        place = (
            {"kind": "step"}
            if group is None
            else {
                "kind": "group",
                "block_list": group.block_list,
                "start": group.start,
                "stop": group.stop,
            }
        )
        rows.append(UnitPlan(cells="".join(symbols), gains=tuple(map(float, gains)), **place))
    return Plan(
        generator="benchmarks/surrogate.py",
        model=ModelFingerprint(**model_fingerprint(pipe.transformer)),
        setting={},
        sigmas=tuple(float(sigma) for sigma in stats.sigmas),
        branches=stats.branches,
        units=tuple(rows),
        budget=Budget(fraction=1.0),
        predicted=Predicted(speedup=1.0, compute_share=1.0, cache_bytes=0),
        certificate=Certificate(
            solver="random", gains=found.gains, power=1.0, objective=0.0, lower_bound=0.0, gap=0.0
        ),
    )


def _span(distance: int) -> str:
    return "0123456789abcdefghijklmnopqrstuvwxyz"[distance]


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


def measure(count: int, steps: int, size: int, parts: Path, progress: bool) -> dict[str, Any]:
    """All figures."""
    pipe = load_pipeline()
    arguments = call_arguments()
    del arguments["generator"], arguments["num_inference_steps"]
    texts = prompts("calibration", size)
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
    informed = dataclasses.replace(residual, amplification=replay.amplification)
    call = arguments | {"num_inference_steps": steps}
    order = sorted(batches(texts, 0, 1, call), key=lambda batch: batch.ids)
    features = Features(pipe, order, replay)
    validation = batches(prompts("validation", size), 1, 8, call)
    reference = final_latents(pipe, validation)

    rng = np.random.default_rng(0)
    plans = [candidate(replay, index, rng) for index in range(count)]
    rows: list[dict[str, Any]] = []
    for plan in tqdm(plans, desc="plans", disable=not progress):
        with apply_plan(pipe, as_plan(pipe, replay, plan)):
            error = (final_latents(pipe, validation) - reference).pow(2).mean(1).numpy()
        rows.append(
            {
                "kind": "+".join(plan.kind),
                "gains": plan.gains,
                "share": plan.share,
                "measured": geometric(error),
                "velocity": objective(replay, plan),
                "residual": objective(residual, plan),
                "residual_probes": objective(informed, plan),
                "feature": features.error(plan),
                "velocity_vector": geometric(
                    trajectory_error(replay, plan.solution.units, plan.values)
                ),
                "residual_vector": geometric(
                    trajectory_error(residual, plan.solution.units, plan.values)
                ),
            }
        )
    sketched = sketch_errors(replay)
    kinds = sorted({row["kind"] for row in rows})
    return {
        **{f"spearman_{name}": correlation(rows, name) for name in PREDICTIONS},
        "by_kind": {
            kind: {
                name: correlation([row for row in rows if row["kind"] == kind], name)
                for name in PREDICTIONS
            }
            for kind in kinds
        },
        "plans": count,
        "calibration_prompts": size,
        "validation_prompts": size,
        "steps": steps,
        "sketch_error_median": sketched[str(DEFAULT_SIZE)]["squared_norm_median"],
        "sketch_errors": sketched,
        "rows": rows,
    }


def correlation(rows: Sequence[dict[str, Any]], name: str) -> float:
    """Spearman's rank correlation of a prediction with the measured error."""
    found = spearmanr([row[name] for row in rows], [row["measured"] for row in rows])
    return float(found.statistic)


def report(figures: dict[str, Any]) -> str:
    """The figures as a table for a person."""
    lines = [
        f"{figures['plans']} random plans, {figures['steps']} steps, "
        f"{figures['calibration_prompts']} calibration and {figures['validation_prompts']} "
        "validation prompts; Spearman's correlation with the measured final error",
        f"  {'plans':<14}" + "".join(f"{name:>17}" for name in PREDICTIONS),
        f"  {'all':<14}" + "".join(f"{figures[f'spearman_{name}']:>17.3f}" for name in PREDICTIONS),
    ]
    for kind, values in figures["by_kind"].items():
        lines.append(f"  {kind:<14}" + "".join(f"{values[name]:>17.3f}" for name in PREDICTIONS))
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="a small run, for a smoke test")
    parser.add_argument("--plans", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--parts", type=Path, help="folder that keeps the statistics")
    chosen = parser.parse_args()
    sizes = (6, 12, 2) if chosen.quick else (chosen.plans, chosen.steps, chosen.prompts)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(*sizes, chosen.parts or Path(folder), progress=not chosen.json)
    print(json.dumps(figures) if chosen.json else report(figures))


if __name__ == "__main__":
    main()
