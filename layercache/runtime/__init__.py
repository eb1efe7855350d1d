"""The runtime: puts a plan on a diffusers pipeline and takes it off again.

`runtime.executor`, which moves latents by a plan of whole steps, works without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layercache.runtime.apply import apply_plan
    from layercache.runtime.checking import check_adapter
    from layercache.runtime.compiling import compile_blocks
    from layercache.runtime.executor import StepExecutor
    from layercache.runtime.report import RunReport, UnitReport
    from layercache.runtime.run import PlanRun
    from layercache.runtime.scheduler import LayerCacheScheduler

__all__ = [
    "LayerCacheScheduler",
    "PlanRun",
    "RunReport",
    "StepExecutor",
    "UnitReport",
    "apply_plan",
    "check_adapter",
    "compile_blocks",
]

_HOMES = {
    "LayerCacheScheduler": "scheduler",
    "PlanRun": "run",
    "RunReport": "report",
    "StepExecutor": "executor",
    "UnitReport": "report",
    "apply_plan": "apply",
    "check_adapter": "checking",
    "compile_blocks": "compiling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
