"""Solvers of the schedule problem: numpy (and scipy in `milp`), no torch, no plan.

`SOLVERS[name](problem) -> ScheduleSolution`.
"""

from layercache.solver import dp, greedy
from layercache.solver._solution import ScheduleSolution, Solver
from layercache.solver.problem import (
    InfeasibleBudgetError,
    ProblemError,
    ScheduleProblem,
    UnitCosts,
)


def _milp(problem: ScheduleProblem) -> ScheduleSolution:
    # Imported when used: scipy.optimize takes longer to import than most plans take to compile.
    from layercache.solver import milp

    return milp.solve(problem)


SOLVERS: dict[str, Solver] = {"greedy": greedy.solve, "dp": dp.solve, "milp": _milp}

__all__ = [
    "SOLVERS",
    "InfeasibleBudgetError",
    "ProblemError",
    "ScheduleProblem",
    "ScheduleSolution",
    "Solver",
    "UnitCosts",
]
