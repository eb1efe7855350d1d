"""The runtime: puts a plan on a diffusers pipeline and takes it off again.

`runtime.executor`, which moves latents by a plan of whole steps, works without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layercache.runtime._apply import apply_plan
    from layercache.runtime._checking import check_adapter
    from layercache.runtime._compiling import compile_blocks
    from layercache.runtime._fits import check_run
    from layercache.runtime._report import RunReport, UnitReport
    from layercache.runtime._run import PlanRun
    from layercache.runtime._scheduler import LayerCacheScheduler
    from layercache.runtime.executor import StepExecutor

__all__ = [
    "LayerCacheScheduler",
    "PlanRun",
    "RunReport",
    "StepExecutor",
    "UnitReport",
    "apply_plan",
    "check_adapter",
    "check_run",
    "compile_blocks",
]

_HOMES = {
    "LayerCacheScheduler": "_scheduler",
    "PlanRun": "_run",
    "RunReport": "_report",
    "StepExecutor": "executor",
    "UnitReport": "_report",
    "apply_plan": "_apply",
    "check_adapter": "_checking",
    "check_run": "_fits",
    "compile_blocks": "_compiling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
