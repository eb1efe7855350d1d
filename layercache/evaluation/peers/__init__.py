"""The rivals that the demo shows, each in a short file that cites its source.

Those of the benchmark are in `bench/peers`, which is not installed.
"""

from layercache.evaluation.peers.fewer_steps import FewerSteps
from layercache.evaluation.peers.meancache import MeanCache, mean_cache_schedules
from layercache.evaluation.peers.uniform import Uniform

__all__ = ["FewerSteps", "MeanCache", "Uniform", "mean_cache_schedules"]
