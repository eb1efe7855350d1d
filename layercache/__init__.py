"""LayerCache: calibrate a flow-matching model once, compile caching plans for any budget.

Importing this package does not import torch. Calibration and the runtime, which need it, are
`layercache.calibration` and `layercache.runtime`.
"""

from layercache._version import VERSION as __version__
from layercache.compile import compile_plan, pareto
from layercache.errors import (
    BudgetError,
    LayerCacheError,
    ModelMismatchError,
    PlanError,
    StatsError,
    UnsupportedModelError,
)
from layercache.options import Options
from layercache.plan import Budget, Plan
from layercache.plan_set import PlanSet
from layercache.stats import CalibrationStats, Group

__all__ = [
    "Budget",
    "BudgetError",
    "CalibrationStats",
    "Group",
    "LayerCacheError",
    "ModelMismatchError",
    "Options",
    "Plan",
    "PlanError",
    "PlanSet",
    "StatsError",
    "UnsupportedModelError",
    "__version__",
    "compile_plan",
    "pareto",
]
