"""How fast and how good the solvers are.

    python -m bench.solver [--json] [--quick]

- `greedy_60_ms`, `dp_60_s`, `dp_60_peak_mb`: one solve of 50 steps, 60 groups, history 1, with
  unequal real-valued times; medians of repeated runs, and the peak of memory allocated by dp.
- `dp_120_s`: dp on 100 steps, 120 groups.
- `milp_over_dp`: seconds of milp over seconds of dp, at the same optimum, on the largest of a
  ladder of instances that milp proves within its time limit.
- `greedy_gap_median`, `greedy_gap_worst`: (greedy - dp) / dp over 200 random instances and over 20
  calibrated ones, groups only: the reference model, calibrated on four prompts with eight groups
  before the clock starts (about a minute), or the statistics of `--stats FILE`.
- Growth: times over steps and over units, with fitted exponents.

One thread; the tables' prices are computed before the clock starts, since every solver needs them.
"""

from __future__ import annotations

import os

# numpy's pools read these when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import functools
import json
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from layercache import CalibrationStats
from layercache.costs import cell_ms, full_ms
from layercache.prediction import price
from layercache.solver import SOLVERS, ScheduleProblem, UnitCosts
from layercache.solver import milp as milp_module

LAGS = 8


@dataclass(frozen=True)
class Size:
    """How large the instances are; pairs are steps and units.

    Attributes:
        small: Of `greedy_60_ms` and `dp_60_s`.
        large: Of `dp_120_s`.
        ladder: What milp climbs.
        milp_s: Its time limit in seconds.
        random: Random instances that greedy is compared on.
        shares: Budgets of calibrated instances, from 0.35 to 0.9 of the compute.
        steps: Whose growth is measured, with 15 units.
        units: Whose growth is measured, with 50 steps.
        repeats: Timed calls.
        calibration: Prompts and steps of the statistics that are measured where none are given.
    """

    small: tuple[int, int] = (50, 60)
    large: tuple[int, int] = (100, 120)
    ladder: tuple[tuple[int, int], ...] = (
        (10, 2), (16, 4), (24, 6), (30, 8), (40, 12), (50, 15), (50, 30), (50, 60), (100, 60),
    )  # fmt: skip
    milp_s: float = 120.0
    random: int = 200
    shares: int = 20
    steps: tuple[int, ...] = (25, 50, 100, 200)
    units: tuple[int, ...] = (4, 15, 60, 240)
    repeats: int = 5
    calibration: tuple[int, int] = (4, 50)


QUICK = Size(
    small=(8, 3),
    large=(10, 4),
    ladder=((6, 1), (8, 2)),
    milp_s=10.0,
    random=3,
    shares=3,
    steps=(8, 12),
    units=(1, 2),
    repeats=1,
    calibration=(1, 10),
)


def instance(
    steps: int, units: int, seed: int = 0, share: float = 0.5, lags: int = LAGS
) -> ScheduleProblem:
    """Prices that grow with the lag and fall with a prediction, as measured ones do; real times."""
    rng = np.random.default_rng(seed)
    _, i, j = np.ogrid[:steps, :lags, :lags]
    rows = []
    for index in range(units):
        level = rng.uniform(0.5, 3.0) * (0.3 + rng.random((steps, 1, 1)))
        shape = (1.0 + i) ** 2 * np.where(j == 0, 1.0, 0.4 + 0.3 * i / (1 + j))
        errors = level * shape * rng.uniform(0.7, 1.3, (steps, lags, lags))
        errors[:, np.broadcast_to(i + j >= lags, (1, lags, lags))[0]] = np.inf
        rows.append(
            UnitCosts(
                name=f"g{index}",
                kind="group",
                compute_ms=np.full(steps, rng.uniform(0.8, 1.2)),
                residual_bytes=1,
                errors=errors,
            )
        )
    full = sum(float(row.compute_ms.sum()) for row in rows)
    problem = ScheduleProblem(
        units=tuple(rows),
        budget_ms=share * full,
        history=1,
    )
    _ = problem.prices
    return problem


def reference_stats(count: int, steps: int) -> CalibrationStats:
    """Calibration prompts of the reference model, eight groups."""
    from layercache.calibration import calibrate
    from layercache.reference import call_arguments, load_pipeline, prompts

    arguments = call_arguments()
    del arguments["generator"], arguments["num_inference_steps"]
    return calibrate(
        load_pipeline(),
        prompts("calibration", count),
        num_inference_steps=steps,
        groups=8,
        lags=LAGS,
        batch_size=count,
        sketch_size=256,
        call_kwargs=arguments,
    )


def calibrated(stats: CalibrationStats, share: float) -> ScheduleProblem:
    """The problem of some statistics at a share of the compute, as published."""
    problem = ScheduleProblem(
        units=price(stats, ("groups",), "published"),
        budget_ms=share * full_ms(stats),
        fixed_ms=float(cell_ms(stats)[:, -1].sum()),
    )
    _ = problem.prices
    return problem


def shares(count: int) -> list[float]:
    """Budgets from 0.35 to 0.9 of the compute."""
    return [float(share) for share in np.linspace(0.35, 0.9, count)]


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call, after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def peak_mb(work: Callable[[], Any]) -> float:
    """Peak megabytes that a call allocates (numpy reports its arrays to tracemalloc)."""
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


def against_milp(size: Size) -> dict[str, Any]:
    """Climb the ladder until milp cannot prove optimality in time; the last rung that it can."""
    best: dict[str, Any] = {}
    for steps, units in size.ladder:
        problem = instance(steps, units)
        begin = time.perf_counter()
        reference = milp_module.solve(problem, size.milp_s)
        taken = time.perf_counter() - begin
        if reference.status != "optimal":
            print(f"  milp {steps} x {units}: not proven in {size.milp_s:g} s", file=sys.stderr)
            break
        mine = SOLVERS["dp"](problem)
        best = {
            "steps": steps,
            "units": units,
            "milp_s": taken,
            "dp_s": seconds(functools.partial(SOLVERS["dp"], problem), size.repeats),
            "objective_ratio": mine.objective / reference.objective,
        }
        print(
            f"  milp {steps} x {units}: {taken:.2f} s, dp {best['dp_s'] * 1e3:.2f} ms, "
            f"objective ratio {best['objective_ratio']:.9f}",
            file=sys.stderr,
        )
    return best


def greedy_gaps(stats: CalibrationStats, size: Size) -> dict[str, list[float]]:
    """Relative loss of greedy against dp; instances that greedy cannot finish are left out."""
    rng = np.random.default_rng(7)
    problems: dict[str, list[ScheduleProblem]] = {"random": [], "calibrated": []}
    for seed in range(size.random):
        steps, units = int(rng.integers(10, 41)), int(rng.integers(1, 13))
        problems["random"].append(instance(steps, units, seed, float(rng.uniform(0.35, 0.9))))
    problems["calibrated"] = [calibrated(stats, share) for share in shares(size.shares)]
    gaps: dict[str, list[float]] = {}
    for kind, rows in problems.items():
        gaps[kind] = []
        for problem in rows:
            best = SOLVERS["dp"](problem)
            try:
                found = SOLVERS["greedy"](problem)
            except ValueError:
                continue
            gaps[kind].append(found.objective / best.objective - 1)
    return gaps


def growth(size: Size) -> dict[str, Any]:
    """Seconds over steps (15 units) and over units (50 steps), and fitted exponents."""
    steps, units = size.steps, size.units
    result: dict[str, Any] = {"steps": list(steps), "units": list(units)}
    for name in ("greedy", "dp"):
        for axis, values in (("steps", steps), ("units", units)):
            times = []
            for value in values:
                problem = instance(value, 15) if axis == "steps" else instance(50, value)
                times.append(
                    seconds(functools.partial(SOLVERS[name], problem), min(3, size.repeats))
                )
            slope = float(np.polyfit(np.log(values), np.log(times), 1)[0])
            result[f"{name}_{axis}_s"] = times
            result[f"{name}_{axis}_exponent"] = slope
    return result


def measure(size: Size, stats: CalibrationStats) -> dict[str, Any]:
    """All figures."""
    small, large, repeats = instance(*size.small), instance(*size.large), size.repeats
    figures: dict[str, Any] = {
        "greedy_60_ms": 1e3 * seconds(lambda: SOLVERS["greedy"](small), repeats),
        "dp_60_s": seconds(lambda: SOLVERS["dp"](small), repeats),
        "dp_60_peak_mb": peak_mb(lambda: SOLVERS["dp"](small)),
        "dp_120_s": seconds(lambda: SOLVERS["dp"](large), min(3, repeats)),
        "dp_60_status": SOLVERS["dp"](small).status,
        "dp_120_status": SOLVERS["dp"](large).status,
    }
    figures["milp"] = against_milp(size)
    figures["milp_over_dp"] = figures["milp"]["milp_s"] / figures["milp"]["dp_s"]
    gaps = greedy_gaps(stats, size)
    both = gaps["random"] + gaps["calibrated"]
    figures["greedy_gap_median"] = statistics.median(both)
    figures["greedy_gap_worst"] = max(both)
    for kind, values in gaps.items():
        figures[f"greedy_gap_{kind}"] = {
            "instances": len(values),
            "median": statistics.median(values),
            "worst": max(values),
        }
    figures["growth"] = growth(size)
    return figures


def report(figures: dict[str, Any]) -> str:
    """The figures as a table for a person."""
    milp, curve = figures["milp"], figures["growth"]
    lines = [
        "solvers, one thread",
        f"  greedy, 50 steps x 60 groups    {figures['greedy_60_ms']:9.1f} ms",
        f"  dp, 50 x 60                     {1e3 * figures['dp_60_s']:9.1f} ms, peak "
        f"{figures['dp_60_peak_mb']:.0f} MB, {figures['dp_60_status']}",
        f"  dp, 100 x 120                   {1e3 * figures['dp_120_s']:9.1f} ms, "
        f"{figures['dp_120_status']}",
        f"  milp, {milp['steps']} x {milp['units']:<26} {1e3 * milp['milp_s']:9.1f} ms, dp "
        f"{1e3 * milp['dp_s']:.2f} ms: dp is {figures['milp_over_dp']:.0f} times faster, objective "
        f"ratio {milp['objective_ratio']:.9f}",
    ]
    for kind in ("random", "calibrated"):
        gap = figures[f"greedy_gap_{kind}"]
        lines.append(
            f"  greedy over dp, {kind:<10} ({gap['instances']:>3})     median "
            f"{100 * gap['median']:.1f} %, worst {100 * gap['worst']:.1f} %"
        )
    for name in ("greedy", "dp"):
        for axis in ("steps", "units"):
            times = "  ".join(
                f"{value}: {1e3 * taken:.1f} ms"
                for value, taken in zip(curve[axis], curve[f"{name}_{axis}_s"], strict=True)
            )
            power = curve[f"{name}_{axis}_exponent"]
            lines.append(f"  {name:<6} over {axis:<5} ~ n^{power:.2f}   {times}")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="smaller runs, for a smoke test")
    parser.add_argument("--stats", type=Path, help="a statistics file for the calibrated instances")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else Size()
    given = arguments.stats
    stats = CalibrationStats.load(given) if given else reference_stats(*size.calibration)
    figures = measure(size, stats)
    print(json.dumps(figures) if arguments.json else report(figures))


if __name__ == "__main__":
    main()
