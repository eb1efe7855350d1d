"""Calibration: run a pipeline at full compute and measure what every cell of a plan would cost."""

from layercache.calibration._estimate import CalibrationEstimate
from layercache.calibration._function import calibrate_function
from layercache.calibration._options import Options
from layercache.calibration._sketch import CountSketch
from layercache.calibration.calibrate import calibrate, estimate_calibration

__all__ = [
    "CalibrationEstimate",
    "CountSketch",
    "Options",
    "calibrate",
    "calibrate_function",
    "estimate_calibration",
]
