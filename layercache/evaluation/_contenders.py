"""Builds every method of the comparison for a budget; no held-out prompt is seen here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from layercache.calibration.prompts import Batch
from layercache.compile import pareto
from layercache.costs import full_ms, speedup_of
from layercache.errors import BudgetError
from layercache.evaluation._latency import run_once
from layercache.evaluation._trajectories import Trajectories
from layercache.evaluation.methods import LayerCache, Method, Uncached
from layercache.evaluation.metrics import fidelity
from layercache.evaluation.peers import FewerSteps, MeanCache, Uniform
from layercache.evaluation.peers.meancache import candidate_schedules
from layercache.evaluation.peers.uniform import uniform_steps
from layercache.options import Options
from layercache.plan import Budget, Plan
from layercache.stats import CalibrationStats

PUBLISHED = Options(solver="greedy", units=("groups",), predictor="published")
"""LayerCache as published (arXiv 2604.16492): groups only, greedy, the plain JVP predictor."""


class Contenders:
    """Builds the methods; what does not depend on the budget is computed once.

    Args:
        pipe: The pipeline.
        stats: Calibration statistics, for plans and predicted speed.
        trajectories: Uncached runs of calibration prompts, for MeanCache.
        validation: Prompts, none of them held out, on which MeanCache's schedule is chosen.
        screened: How many of MeanCache's schedules run on the validation prompts, the most
            promising ones first, besides one that only reuses; None runs all.
        log: Receives a line where a method has no plan for a budget.
    """

    def __init__(
        self,
        pipe: Any,
        stats: CalibrationStats,
        trajectories: Trajectories,
        validation: Sequence[Batch],
        screened: int | None = None,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.pipe, self.stats, self.trajectories = pipe, stats, trajectories
        self.validation, self.screened, self.log = validation, screened, log
        self._references: list[Tensor] | None = None

    def build(self, target: float, plan: Plan) -> list[Method]:
        """All methods that spend at most 1 / target of the full transformer compute.

        Args:
            target: The target speedup, as a factor of transformer compute.
            plan: The plan to compare, compiled for this budget.

        Raises:
            BudgetError: The budget is less than one step.
        """
        steps = self.stats.num_steps
        # The tolerance lets 50 / 2 be 25 steps whatever the rounding of 1 / target.
        budget = int(steps / target + 1e-9)
        if budget < 1:
            raise BudgetError(
                f"a target of {target:g}x leaves less than one of {steps} steps; lower the target"
            )
        speed = self._speedup(budget)
        return [
            LayerCache(plan),
            *self._published(target),
            replace(self.mean_cache(budget), predicted_speedup=speed),
            Uniform(uniform_steps(steps, budget), predicted_speedup=speed),
            FewerSteps(budget, steps, predicted_speedup=steps / budget),
        ]

    def _published(self, target: float) -> list[Method]:
        """The published LayerCache, which caches groups only and so cannot reach every budget."""
        try:
            return [LayerCache(published_plan(self.stats, target), name="layercache-published")]
        except BudgetError as error:
            self.log(f"layercache-published is left out at {target:g}x: {error}")
            return []

    def mean_cache(self, budget: int) -> MeanCache:
        """The schedule of MeanCache with the highest mean PSNR on the validation prompts."""
        sigmas = tuple(float(sigma) for sigma in self.trajectories.sigmas)
        schedules = candidate_schedules(self.trajectories, budget, self.screened)
        candidates = [MeanCache(edges, sigmas) for edges in schedules]
        return max(candidates, key=self._validation_psnr)

    def _validation_psnr(self, method: Method) -> float:
        if self._references is None:
            self._references = [run_once(self.pipe, Uncached(), b).images for b in self.validation]
        values: list[float] = []
        for batch, reference in zip(self.validation, self._references, strict=True):
            values += fidelity(run_once(self.pipe, method, batch).images, reference).psnr_db
        return sum(values) / len(values)

    def _speedup(self, fresh: int) -> float:
        """Predicted speedup of a whole-step method with this many fresh steps."""
        stats = self.stats
        return speedup_of(stats, full_ms(stats) * fresh / stats.num_steps)


def published_plan(stats: CalibrationStats, target: float) -> Plan:
    """The published LayerCache's plan for a budget."""
    return pareto(stats, [Budget(fraction=1 / target)], PUBLISHED)[0]
