"""Calibration: run a pipeline at full compute and measure what every cell of a plan would cost."""

from layercache.calibration.calibrate import calibrate, estimate_calibration
from layercache.calibration.estimate import CalibrationEstimate
from layercache.calibration.options import Options
from layercache.calibration.sketch import CountSketch

__all__ = ["CalibrationEstimate", "CountSketch", "Options", "calibrate", "estimate_calibration"]
