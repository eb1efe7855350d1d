"""Solvers of the schedule problem: numpy (and scipy in `milp`), no torch, no plan.

`SOLVERS[name](problem) -> ScheduleSolution`.
"""

from layercache.solver import dp, greedy
from layercache.solver.problem import (
    ProblemError,
    ScheduleProblem,
    ScheduleSolution,
    Solver,
    UnitCosts,
    UnitSchedule,
)

SOLVERS: dict[str, Solver] = {"greedy": greedy.solve, "dp": dp.solve}

__all__ = [
    "SOLVERS",
    "ProblemError",
    "ScheduleProblem",
    "ScheduleSolution",
    "Solver",
    "UnitCosts",
    "UnitSchedule",
]
