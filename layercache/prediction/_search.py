"""Schedules searched on the score of the error model, for all budgets up to one.

Budgets are levels, k / T of full compute for k = 1, 2, ... At each level the search starts from the
schedule of the level before, with the best cells added until the level is used up; from evenly
spaced schedules; and from what solvers propose. Each start is annealed, and the best is kept. So a
larger budget is never foretold worse; and a schedule grows out of a good one of a smaller budget,
which a search that starts afresh needs ten times as many evaluations to reach.

Between two levels cells are added at finer levels, one after the other, in the same way. Where only
groups may be cached and that leaves much of a finer level unused, it is searched as a level is: one
cell more can do harm where two do good.

The best of a search is the best of what it met. Nothing is proven about it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from layercache.prediction._anneal import anneal
from layercache.prediction._moves import Table, distinct
from layercache.prediction.error import ErrorModel
from layercache.solver.problem import BoolArray


@dataclass(frozen=True)
class Effort:
    """How much is tried.

    Attributes:
        stride: Levels are so many steps apart.
        parts: Finer levels from one level to the next.
        every: At every so many levels the schedule that grew out of the level before is annealed at
            length: one long annealing finds more than four short ones.
        grown: Neighbours drawn from it there.
        between: Neighbours drawn from it at the levels between.
        fresh: Neighbours drawn from every other start.
    """

    stride: int
    parts: int
    every: int
    grown: int
    between: int
    fresh: int


def effort_for(table: Table) -> Effort:
    """What takes some seconds at 50 steps and 4 groups.

    Evaluations are slower where groups are cached, and schedules there have many more cells.
    """
    # Both the levels and the time of an evaluation grow with the steps.
    every = max(1, round(4 * (table.steps / 50) ** 2))
    if not table.groups:
        return Effort(stride=1, parts=1, every=every, grown=1200, between=80, fresh=20)
    parts = 2 * (len(table.groups) + 1)
    return Effort(stride=2, parts=parts, every=every, grown=120, between=30, fresh=15)


FEW = 6
"""So many of the dearest cached cells are tried when one is to be computed."""

SLACK = 0.03
"""So much of a budget may be left unused."""

Propose = Callable[[float], Sequence[BoolArray]]


@dataclass(frozen=True, eq=False)
class Found:
    """The best schedule of a level, its score, and of how many starts."""

    computed: BoolArray
    score: float
    starts: int


class Search:
    """The search of one set of statistics; levels are made when they are first asked for.

    Args:
        model: A quick error model.
        table: The schedules that are allowed.
        propose: Schedules within a budget to start from, besides evenly spaced ones.
        on_level: Called with the number of a level, from 1 to T, before it is searched.

    Example:
        >>> Search(model, table).best(0.5 * full_ms).score  # doctest: +SKIP
        -5.1
    """

    def __init__(
        self,
        model: ErrorModel,
        table: Table,
        propose: Propose = lambda budget_ms: (),
        on_level: Callable[[int, int], None] = lambda level, levels: None,
    ) -> None:
        self.model, self.table, self.propose, self.on_level = model, table, propose, on_level
        self._scores: dict[bytes, float] = {}
        self._few = table.step_schedules()
        self.effort = effort_for(table)
        self._full = float(table.step_cost.sum())
        self._fine = -(-table.steps // self.effort.stride) * self.effort.parts
        self._part_ms = self._full * self.effort.stride / table.steps / self.effort.parts
        self._found: list[Found | None] = [None]
        self._levels = self._run()

    def best(self, budget_ms: float) -> Found | None:
        """The best schedule within a budget; None if none was found at all."""
        wanted = self._fine_level(budget_ms)
        while len(self._found) <= wanted:
            self._found.append(next(self._levels))
        return self._found[wanted]

    def near(self, budget_ms: float, rise: float) -> list[Found]:
        """The best within a budget, and those of lower levels that come within a rise of it."""
        best = self.best(budget_ms)
        if best is None:
            return []
        levels = self._found[: self._fine_level(budget_ms)]
        close = [found for found in [best, *levels[::-1]] if found is not None]
        close = [found for found in close if found.score <= best.score + rise]
        return list({found.computed.tobytes(): found for found in close}.values())

    @property
    def budgets_ms(self) -> list[float]:
        """The budgets that find schedules of their own, up to full compute."""
        return [min(self._part_ms * level, self._full) for level in range(1, self._fine + 1)]

    def _fine_level(self, budget_ms: float) -> int:
        level = int(np.floor(budget_ms / self._part_ms * (1 + 1e-9) + 1e-9))
        return min(max(level, 0), self._fine)

    def score(self, computed: BoolArray) -> float:
        """The model's score, each schedule's once."""
        key = computed.tobytes()
        if key not in self._scores:
            allowed = self.table.allowed(computed)
            self._scores[key] = self.model.score(computed) if allowed else np.inf
        return self._scores[key]

    def _run(self) -> Iterator[Found | None]:
        """What `best` finds at each fine level, from the first on."""
        grown: Found | None = None
        parts, budgets = self.effort.parts, self.budgets_ms
        for fine in range(1, self._fine + 1):
            budget = budgets[fine - 1]
            if grown is not None:
                grown = self._grow(grown, budget)
            if fine % parts == 0:
                self.on_level(fine // parts, self._fine // parts)
            if fine % parts == 0 or self._slack(grown, budget):
                grown = self._level(grown, budget, fine)
            yield grown

    def _slack(self, found: Found | None, budget: float) -> bool:
        """Whether much is left of a budget that no one cell more would use well."""
        if found is None or self.table.skips:
            return False
        return self.table.spent(found.computed) < (1 - SLACK) * budget

    def _level(self, grown: Found | None, budget: float, seed: int) -> Found | None:
        """The best that annealing finds at a level, or what grew out of the level before."""
        table = self.table
        if table.fits(table.full, budget):
            return Found(table.full, self.score(table.full), 1)
        starts = []
        if grown is not None:
            # Up to the level even where that helps only after something has moved.
            used_up = self._grow(grown, budget, always=True)
            long = seed % (self.effort.parts * self.effort.every) == 0
            trials = self.effort.grown if long else self.effort.between
            starts.append((used_up.computed, trials))
        fresh = distinct([*table.uniform(budget), *self.propose(budget)])
        starts += [(start, self.effort.fresh) for start in fresh]
        results = [(grown.computed, grown.score)] if grown is not None else []
        few = [schedule for schedule in self._few if table.fits(schedule, budget)]
        results += [(schedule, self.score(schedule)) for schedule in few]
        for number, (start, trials) in enumerate(starts):
            if np.isfinite(self.score(start)):
                results.append(
                    anneal(
                        start,
                        self.score,
                        lambda state, rng: table.neighbour(state, budget, rng),
                        trials,
                        1000 * seed + number,
                    )
                )
        if not results:
            return None
        best = min(results, key=lambda result: result[1])
        return Found(best[0], best[1], len(starts))

    def _grow(self, found: Found, budget: float, always: bool = False) -> Found:
        """With the best cells added, one after the other, for as long as they fit (and help)."""
        while True:
            additions = self.table.additions(found.computed, budget)
            if len(additions) > 4 * FEW and self.table.groups:
                additions = self._promising(found.computed, additions)
            scored = [(self.score(addition), addition) for addition in additions]
            if not scored:
                return found
            score, computed = min(scored, key=lambda pair: pair[0])
            if score > found.score and not always:
                return found
            found = Found(computed, score, found.starts)

    def _promising(self, computed: BoolArray, additions: list[BoolArray]) -> list[BoolArray]:
        """Those that compute the cells whose caching is dearest."""
        rank = [-self.model.relief(computed, addition) for addition in additions]
        order = np.argsort(rank, kind="stable")[:FEW]
        return [additions[int(index)] for index in order]
