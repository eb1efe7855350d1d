"""Calibration: run a pipeline at full compute and measure what every cell of a plan would cost."""

from layercache.calibration.calibrate import calibrate
from layercache.calibration.sketch import CountSketch

__all__ = ["CountSketch", "calibrate"]
