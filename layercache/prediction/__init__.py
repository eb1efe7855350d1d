"""What a schedule does to the image, foretold from statistics: numpy, knows no plan.

- `prices`: separable prices, which solvers propose on
- `cells`, `ridge`: the taps of cached groups, and how all taps are fitted
- `error`: the error model, which fits the step unit's taps and scores schedules
- `anneal`, `moves`, `search`: schedules that make the score small
"""

from layercache.prediction._cells import GroupCells
from layercache.prediction._moves import Table
from layercache.prediction._prices import STEP_LAGS, price, uncacheable
from layercache.prediction._search import Propose, Search
from layercache.prediction.error import DEPTH, ErrorModel, Fit, predicted_psnr

__all__ = [
    "DEPTH",
    "STEP_LAGS",
    "ErrorModel",
    "Fit",
    "GroupCells",
    "Propose",
    "Search",
    "Table",
    "predicted_psnr",
    "price",
    "uncacheable",
]
