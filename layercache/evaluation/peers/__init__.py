"""Methods that plans are measured against, each in a short file that cites its source."""

from layercache.evaluation.peers.dpcache import DPCache
from layercache.evaluation.peers.fewer_steps import FewerSteps
from layercache.evaluation.peers.meancache import MeanCache, mean_cache_schedules
from layercache.evaluation.peers.nonstationary import NonStationary, fit_nonstationary
from layercache.evaluation.peers.uniform import Uniform

__all__ = [
    "DPCache",
    "FewerSteps",
    "MeanCache",
    "NonStationary",
    "Uniform",
    "fit_nonstationary",
    "mean_cache_schedules",
]
