"""The runtime: puts a plan on a diffusers pipeline and takes it off again."""

from layercache.runtime.apply import apply_plan
from layercache.runtime.checking import check_adapter
from layercache.runtime.compiling import compile_blocks
from layercache.runtime.report import RunReport, UnitReport
from layercache.runtime.run import PlanRun

__all__ = [
    "PlanRun",
    "RunReport",
    "UnitReport",
    "apply_plan",
    "check_adapter",
    "compile_blocks",
]
