"""Who takes part: each family of methods, with the settings that its sweep tries.

Nothing here sees a held-out prompt. A family that has settings beyond its budget is tuned: all its
entrants run on validation prompts, and the best of them go on (`tuning`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bench.comparison.entrants import Entrant, Family
from bench.comparison.inputs import PUBLISHED_GROUPS, Inputs
from bench.comparison.scenario import SEEDS
from bench.peers.cachedit import CacheDit, cache_dit_version, preset_masks
from bench.peers.diffusers_caches import (
    first_block_cache,
    mag_cache,
    mag_ratios,
    taylor_seer,
)
from bench.peers.dpcache import Abscissa, DPCache, key_steps, step_errors
from bench.peers.lemica import final_errors, minimax_steps
from bench.peers.nodes import NodeSearch
from bench.peers.nonstationary import NonStationary, fit_nonstationary
from bench.peers.seacache import SeaCache
from layercache.compile import compile_plan, pareto
from layercache.errors import BudgetError, LayerCacheError
from layercache.evaluation._contenders import PUBLISHED
from layercache.evaluation.methods import LayerCache
from layercache.evaluation.peers import FewerSteps, MeanCache, Uniform, mean_cache_schedules
from layercache.evaluation.peers.meancache import candidate_schedules
from layercache.evaluation.peers.uniform import uniform_steps
from layercache.options import Options
from layercache.plan import COMPUTED, Budget, Plan
from layercache.refine import refine_plan
from layercache.stats import CalibrationStats


def plans(stats: CalibrationStats, fresh_steps: Sequence[int], options: Options) -> dict[int, Plan]:
    """A plan for the compute of each number of full steps, where there is one that fits."""
    budgets = {count: Budget(fraction=count / stats.num_steps) for count in fresh_steps}
    try:
        return dict(zip(budgets, pareto(stats, list(budgets.values()), options), strict=True))
    except BudgetError:
        return dict(_each(stats, budgets, options))


def _each(
    stats: CalibrationStats, budgets: dict[int, Budget], options: Options
) -> Iterator[tuple[int, Plan]]:
    for count, budget in budgets.items():
        try:
            yield count, pareto(stats, [budget], options)[0]
        except BudgetError:
            continue


def plan_entrants(family: str, found: dict[int, Plan]) -> list[Entrant]:
    """Plans as entrants of a family."""
    return [
        Entrant(family, f"compute of {count} steps", LayerCache(plan, name=family))
        for count, plan in found.items()
    ]


def _layercache(inputs: Inputs) -> list[Entrant]:
    stats = inputs.stats()
    found = {}
    for count in inputs.fresh_steps:
        # Through the public entry point, with no option: what a user gets.
        found[count] = compile_plan(stats, Budget(fraction=count / stats.num_steps))
    return plan_entrants("layercache", found)


def _refined(inputs: Inputs) -> list[Entrant]:
    """The plans of `_layercache`, each refined on the calibration prompts where that can help."""
    entrants = []
    for entrant in _layercache(inputs):
        assert isinstance(entrant.method, LayerCache)
        plan = entrant.method.plan
        unit = plan.step_unit
        if unit is not None and set(unit.cells) != {COMPUTED}:
            refine = functools.partial(_refine, inputs, plan)
            plan = Plan.from_dict(inputs.store.kept("refined plan", [plan], refine))
        method = LayerCache(plan, name="layercache-refined")
        entrants.append(Entrant(method.name, entrant.label, method))
    return entrants


def _refine(inputs: Inputs, plan: Plan) -> dict[str, Any]:
    return refine_plan(
        inputs.pipe,
        plan,
        inputs.stats(),
        inputs.scenario.prompts("calibration", inputs.size.calibration),
        seed=SEEDS["calibration"],
        call_kwargs=inputs.scenario.arguments(),
        log=inputs.log,
    ).to_dict()


def _published(inputs: Inputs) -> list[Entrant]:
    stats = inputs.stats(groups=PUBLISHED_GROUPS)
    return plan_entrants("layercache-published", plans(stats, inputs.fresh_steps, PUBLISHED))


def _mean_cache(inputs: Inputs) -> list[Entrant]:
    return [
        Entrant("meancache", f"{count} steps, schedule {rank}", MeanCache(edges, inputs.sigmas))
        for count in inputs.fresh_steps
        for rank, edges in enumerate(
            candidate_schedules(inputs.trajectories, count, _some(inputs, 2))
        )
    ]


def _non_stationary(inputs: Inputs) -> list[Entrant]:
    errors = step_errors(inputs.trajectories, "sigma")
    growth = inputs.stats().propagation.astype(np.float64)
    grown = NodeSearch(inputs.trajectories, growth)
    alike = NodeSearch(inputs.trajectories, np.ones_like(growth))
    entrants = []
    for count in inputs.fresh_steps:
        mean = MeanCache(mean_cache_schedules(inputs.trajectories, count)[0], inputs.sigmas)
        even = uniform_steps(inputs.scenario.steps, count)
        starts = [key_steps(errors, count, power=2.0), _nodes(mean.fresh), _nodes(even)]
        searched = {
            starts[0]: "nodes by second-order errors",
            alike.best(starts): "nodes by search",
            grown.best(starts): "nodes by search, growth counted",
        }
        for nodes, name in list(searched.items())[-_some(inputs, 3) :]:
            entrants.append(
                Entrant("non-stationary", f"{count} steps, {name}", fitted_solver(inputs, nodes))
            )
    return entrants


def fitted_solver(inputs: Inputs, nodes: Sequence[int]) -> NonStationary:
    """A non-stationary solver on these nodes, fitted once and kept."""

    def fit() -> list[Any]:
        return list(
            fit_nonstationary(inputs.pipe, inputs.calibration, inputs.trajectories, nodes).rows
        )

    rows = inputs.store.kept(
        f"non-stationary {len(nodes)} nodes", [nodes, inputs.calibration.ids], fit
    )
    return NonStationary(tuple(nodes), tuple(tuple(row) for row in rows), inputs.sigmas)


def _dp_cache(inputs: Inputs) -> list[Entrant]:
    kinds: tuple[tuple[Abscissa, tuple[float, ...]], ...] = (
        ("sigma", (1.0, 2.0)),
        ("step", (1.0,)),
    )
    entrants: dict[tuple[Any, ...], Entrant] = {}
    for kind, powers in kinds:
        errors = step_errors(inputs.trajectories, kind)
        for count, power in itertools.product(inputs.fresh_steps, powers):
            keys = key_steps(errors, count, power)
            entrants.setdefault(
                (keys, kind),
                Entrant(
                    "dpcache",
                    f"{count} steps, over {kind}, power {power:g}",
                    DPCache(keys, inputs.sigmas, kind),
                ),
            )
    return list(entrants.values())


def _lemica(inputs: Inputs) -> list[Entrant]:
    costs = final_errors(inputs.trajectories, inputs.stats().propagation)
    return [
        Entrant("lemica", f"{count} steps", Uniform(minimax_steps(costs, count), name="lemica"))
        for count in inputs.fresh_steps
    ]


def _uniform(inputs: Inputs) -> list[Entrant]:
    steps = inputs.scenario.steps
    return [
        Entrant("uniform", f"{count} steps", Uniform(uniform_steps(steps, count)))
        for count in inputs.fresh_steps
    ]


def _fewer_steps(inputs: Inputs) -> list[Entrant]:
    steps = inputs.scenario.steps
    return [
        Entrant("fewer-steps", f"{count} steps", FewerSteps(count, steps))
        for count in inputs.fresh_steps
    ]


_THRESHOLDS = (0.01, 0.02, 0.03, 0.045, 0.065, 0.09, 0.12, 0.17, 0.24, 0.34, 0.5)


def _first_block(inputs: Inputs) -> list[Entrant]:
    return [
        Entrant("first-block-cache", f"threshold {value:g}", first_block_cache(value))
        for value in _thinned(inputs, _THRESHOLDS)
    ]


def _mag_cache(inputs: Inputs) -> list[Entrant]:
    steps = inputs.scenario.steps
    ratios = inputs.store.kept(
        "magcache ratios",
        inputs.calibration.ids,
        lambda: mag_ratios(inputs.pipe, inputs.calibration, steps),
    )
    grid = itertools.product((0.1, 0.2), (1, 3, 5), (0.03, 0.08, 0.16, 0.35))
    return [
        Entrant(
            "magcache",
            f"threshold {threshold:g}, at most {skip} in a row, first {100 * keep:g} % kept",
            mag_cache(ratios, threshold, skip, keep),
        )
        for keep, skip, threshold in _thinned(inputs, list(grid))
    ]


def _taylor_seer(inputs: Inputs) -> list[Entrant]:
    grid = itertools.product(("lite", "blocks"), (1, 2), (2, 3, 4, 6))
    return [
        Entrant(
            "taylorseer",
            f"{modules}, order {order}, every {interval} steps",
            taylor_seer(modules, interval, order),
        )
        for modules, order, interval in _thinned(inputs, list(grid))
    ]


def _sea_cache(inputs: Inputs) -> list[Entrant]:
    grid = itertools.product((0, 1), (2, 0), (0.03, 0.05, 0.08, 0.13, 0.2, 0.35))
    return [
        Entrant(
            "seacache",
            f"threshold {threshold:g}, order {order}, at most {most or 'any'} in a row",
            SeaCache(threshold, order, most),
        )
        for order, most, threshold in _thinned(inputs, list(grid))
    ]


def _db_cache(inputs: Inputs) -> list[Entrant]:
    return list(_cache_dit(inputs, "cache-dit", orders=(0,)))


def _db_cache_taylor(inputs: Inputs) -> list[Entrant]:
    return list(_cache_dit(inputs, "cache-dit-taylorseer", orders=(1, 2)))


def _cache_dit(inputs: Inputs, name: str, orders: Sequence[int]) -> Iterator[Entrant]:
    _require_cache_dit()
    thresholds = (0.02, 0.04, 0.08, 0.12, 0.18, 0.27, 0.4)
    blocks = (1, 8) if len(orders) == 1 else (1,)
    grid = itertools.product(orders, blocks, thresholds)
    for order, first, threshold in _thinned(inputs, list(grid)):
        yield Entrant(
            name,
            f"threshold {threshold:g}, F{first}" + (f", order {order}" if order else ""),
            CacheDit(
                name,
                threshold=threshold,
                first_blocks=first,
                warm_up=4,
                taylor_order=order,
                branches=inputs.scenario.branches,
            ),
        )


def _cache_dit_mask(inputs: Inputs) -> list[Entrant]:
    _require_cache_dit()
    steps = inputs.scenario.steps
    grid: list[tuple[str, tuple[bool, ...], int]] = [
        (f"preset {name}", mask, order)
        for name, mask in preset_masks(steps).items()
        for order in (0, 1)
    ]
    grid += [
        (f"{count} even steps", uniform_steps(steps, count), 1) for count in inputs.fresh_steps
    ]
    return [
        Entrant(
            "cache-dit-mask",
            label + (f", order {order}" if order else ""),
            CacheDit(
                "cache-dit-mask",
                first_blocks=1,
                taylor_order=order,
                mask=mask,
                branches=inputs.scenario.branches,
            ),
        )
        for label, mask, order in _thinned(inputs, grid)
    ]


def _require_cache_dit() -> None:
    if cache_dit_version() is None:
        raise LayerCacheError(
            "cache-dit is not installed: pip install 'layercache-flow[peers]' to include it"
        )


def _nodes(fresh: Sequence[bool]) -> tuple[int, ...]:
    return tuple(step for step, computed in enumerate(fresh) if computed)


def _some(inputs: Inputs, count: int) -> int:
    return max(1, round(count * inputs.size.grid))


def _thinned(inputs: Inputs, grid: Sequence[Any]) -> list[Any]:
    """Every k-th point of a grid, spread over all of it."""
    keep = max(4, round(len(grid) * inputs.size.grid))
    if keep >= len(grid):
        return list(grid)
    return [grid[(2 * i + 1) * len(grid) // (2 * keep)] for i in range(keep)]


FIELD: dict[str, Family] = {
    family.name: family
    for family in (
        Family("layercache", _layercache, "this package, its default"),
        Family("layercache-refined", _refined, "this package, `refine_plan`"),
        Family("layercache-published", _published, "arXiv 2604.16492"),
        Family("non-stationary", _non_stationary, "arXiv 2403.01329", tuned=True),
        Family("meancache", _mean_cache, "arXiv 2601.19961", tuned=True),
        Family("dpcache", _dp_cache, "arXiv 2602.22654", tuned=True),
        Family("lemica", _lemica, "arXiv 2511.00090"),
        Family("magcache", _mag_cache, "diffusers, arXiv 2506.09045", tuned=True, foreign=True),
        Family("taylorseer", _taylor_seer, "diffusers, arXiv 2503.06923", tuned=True, foreign=True),
        Family("seacache", _sea_cache, "diffusers, arXiv 2602.18993", tuned=True, foreign=True),
        Family("first-block-cache", _first_block, "diffusers", tuned=True, foreign=True),
        Family("cache-dit", _db_cache, "cache-dit, DBCache", tuned=True, foreign=True),
        Family(
            "cache-dit-taylorseer",
            _db_cache_taylor,
            "cache-dit, DBCache with TaylorSeer",
            tuned=True,
            foreign=True,
        ),
        Family(
            "cache-dit-mask", _cache_dit_mask, "cache-dit, static masks", tuned=True, foreign=True
        ),
        Family("uniform", _uniform, "plain reuse on an even grid"),
        Family("fewer-steps", _fewer_steps, "the pipeline with fewer steps"),
    )
}
"""Every family, by name, in the order of the tables."""


def with_share(entrant: Entrant, share: float) -> Entrant:
    """The entrant, its share of compute as it was counted."""
    method: Any = entrant.method
    return replace(entrant, method=replace(method, compute_share=share))
