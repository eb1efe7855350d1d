"""`compile_plan`: where statistics, solvers and plans meet. On its way to the new plan format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layercache.options import Options
from layercache.plan import Budget, Plan
from layercache.stats import CalibrationStats


def compile_plan(stats: CalibrationStats, budget: Budget | float | str, **options: Any) -> Plan:
    """Not there yet in this commit."""
    raise NotImplementedError("compile_plan is being rewritten for plan format 1")


def pareto(
    stats: CalibrationStats,
    budgets: Sequence[Budget | float | str],
    options: Options | None = None,
) -> list[Plan]:
    """Not there yet in this commit."""
    raise NotImplementedError("pareto is being rewritten for plan format 1")
