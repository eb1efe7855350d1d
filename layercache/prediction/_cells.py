"""What a cached group does to a step's velocity, and the taps that make it least.

With the group replaced by sum_h c_h r_{a_h}, sum_h c_h = 1 (its anchor a and earlier computed steps
a_1, a_2, ...), the velocity of step t moves by

    delta = sum_h c_h D[t, g, t - a_h] = D_a + sum_h b_h (D_a - D_{a_h}),

D[t, g, lag] the measured change for the residual of `lag` steps ago. The taps b make the weighted
mean of ||delta||^2 least (`ridge`), pulled towards the published predictor, the one tap (sigma_t -
sigma_a) / (sigma_a - sigma_{a_1}).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from layercache.prediction.ridge import DECIMALS, LeastSquares, quick_fit
from layercache.stats import CalibrationStats, FloatArray

LONGEST_SPAN = 35
"""Between the anchor and the farthest value read; a plan has symbols for no longer ones."""


@dataclass(frozen=True, eq=False)
class Cell:
    """A cached cell of a group.

    Attributes:
        taps: On the computed steps before the anchor, latest first.
        published: Whether they are those of the published predictor (reuse among them).
        delta: (P, N) what it moves the velocity by.
        size: (P,) the norm of that.
    """

    taps: tuple[float, ...]
    published: bool
    delta: FloatArray
    size: FloatArray

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """c_k: of the residual of each step read, the anchor first; they sum to 1."""
        return (1 + sum(self.taps), *(-tap for tap in self.taps))


class GroupCells:
    """Cells of all groups of some statistics, each fitted once.

    Args:
        stats: Calibration statistics.
        deltas: (P, T, G, M, N) the deltas, or sketches of them.
        predictor: `"fitted"`, `"published"` or `"reuse"`.
        quick: Whether taps are fitted as a search needs them.
    """

    def __init__(
        self, stats: CalibrationStats, deltas: FloatArray, predictor: str, quick: bool
    ) -> None:
        self.sigmas = np.asarray(stats.sigmas, dtype=np.float64)
        # (T, G, M, P, N), so that what a cell needs lies together.
        self.deltas = np.ascontiguousarray(deltas.transpose(1, 2, 3, 0, 4))
        self.predictor, self.quick = predictor, quick
        self.max_lag = stats.max_lag
        self._known: dict[tuple[int, int, tuple[int, ...]], Cell] = {}

    def sources(self, step: int, computed: Sequence[int], depth: int) -> tuple[int, ...]:
        """The anchor and the earlier computed steps that a cell may read, latest first."""
        most = {"fitted": depth, "published": min(depth, 1), "reuse": 0}[self.predictor]
        oldest = max(step - self.max_lag, computed[-1] - LONGEST_SPAN)
        return tuple(source for source in computed[::-1][: 1 + most] if source >= oldest)

    def cell(self, step: int, group: int, sources: tuple[int, ...]) -> Cell:
        """The cell with this anchor and these earlier steps."""
        key = step, group, sources
        if key not in self._known:
            self._known[key] = self._fit(*key)
        return self._known[key]

    def _fit(self, step: int, group: int, sources: tuple[int, ...]) -> Cell:
        lags = [step - source - 1 for source in sources]
        measured = self.deltas[step, group, lags].astype(np.float64)
        reuse = measured[0]
        plain = Cell((), True, reuse, _norm(reuse))
        if len(sources) < 2:
            return plain
        moves = reuse - measured[1:]
        anchor, base = sources[:2]
        rise = self.sigmas[step] - self.sigmas[anchor]
        tap = float(rise / (self.sigmas[anchor] - self.sigmas[base]))
        delta = reuse + tap * moves[0]
        published = Cell((tap,), True, delta, _norm(delta))
        if self.predictor == "published":
            return min(plain, published, key=lambda cell: float((cell.size**2).mean()))
        prior = np.zeros(len(moves))
        prior[0] = tap
        if self.quick:
            taps = quick_fit(delta, moves, prior)
        else:
            taps = np.round(LeastSquares.of(delta, moves, prior, plain.size**2).fit(), DECIMALS)
        delta = reuse + (taps @ moves.reshape(len(moves), -1)).reshape(reuse.shape)
        return Cell(tuple(taps.tolist()), False, delta, _norm(delta))


def _norm(vectors: FloatArray) -> FloatArray:
    norm: FloatArray = np.sqrt(np.einsum("pn,pn->p", vectors, vectors))
    return norm
