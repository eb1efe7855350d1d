"""What a schedule does to the image, foretold from statistics: numpy, knows no plan.

- `prices`: separable prices, which solvers propose on
- `cells`, `ridge`: the taps of cached groups, and how all taps are fitted
- `error`: the error model, which fits the step unit's taps and scores schedules
- `anneal`, `moves`, `search`: schedules that make the score small
- `paying`: whether caching layers pays on a model
- `resample`: statistics at other noise levels
"""

from layercache.prediction._moves import Table
from layercache.prediction._paying import Paying, paying
from layercache.prediction._prices import STEP_LAGS, price, uncacheable
from layercache.prediction._search import Search
from layercache.prediction.error import DEPTH, ErrorModel, Fit, predicted_psnr
from layercache.prediction.resample import resample

__all__ = [
    "DEPTH",
    "STEP_LAGS",
    "ErrorModel",
    "Fit",
    "Paying",
    "Search",
    "Table",
    "paying",
    "predicted_psnr",
    "price",
    "resample",
    "uncacheable",
]
