"""What several cached groups do to a step's velocity together.

Deltas are measured one group at a time, the others computed. A group that is computed answers to
what the groups before it changed, and one that is cached cannot. So two cached groups g and h move
the velocity not by D_g + D_h but, to first order and with what they can no longer answer in the
directions of both, by

    J_gh = b_gh D_g + b_hg D_h,

and more of them by D_S = sum_g (prod_h b_gh) D_g over the h that are cached too. Calibration
measures J of every pair at a few steps (`stats.joint`), the b are least squares over prompts and
steps, and what these leave of J, as a share of its square, is the variance of any D_S.

A cached group h that was computed last while g, before it, was cached already has answered to what
g was off then. Of g's error only a part f came since, by noise level, f = (sigma_h - sigma_t) /
(sigma_g - sigma_t) of the two anchors where that is below 1; then b is 1 - f (1 - b).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from layercache.stats import CalibrationStats, FloatArray

RIDGE = 1e-2
"""Pull of both coefficients of a pair towards 1, as a share of their mean square."""


@dataclass(frozen=True, eq=False)
class Joint:
    """How groups cached at one step act together.

    Attributes:
        keeps: (G, G) b_gh, what is left of D_g when h is cached too; 1 on the diagonal.
        left: Variance of the joint delta, as a share of its square.
    """

    keeps: FloatArray
    left: float

    @classmethod
    def of(cls, stats: CalibrationStats) -> Joint | None:
        """Fitted to what was measured; None where nothing was."""
        count = stats.num_groups
        sums = np.asarray(stats.joint, dtype=np.float64).sum(axis=0)
        if stats.mode != "replay" or not sums.any():
            return None
        keeps, missed, whole = np.ones((count, count)), 0.0, 0.0
        for (g, h), (gg, gh, hh, jg, jh, jj) in zip(
            itertools.combinations(range(count), 2), sums, strict=True
        ):
            ridge = RIDGE * (gg + hh) / 2
            if ridge <= 0:
                continue
            gram = np.array([[gg + ridge, gh], [gh, hh + ridge]])
            pair = np.linalg.solve(gram, [jg + ridge, jh + ridge])
            keeps[g, h], keeps[h, g] = pair
            square = float(pair @ [[gg, gh], [gh, hh]] @ pair)
            missed += max(jj - 2 * float(pair @ [jg, jh]) + square, 0.0)
            whole += square
        return cls(keeps, missed / whole if whole > 0 else 0.0)

    def shares(self, groups: Sequence[int], anchors: Sequence[float], sigma: float) -> FloatArray:
        """(k,) what each cached group's delta counts for.

        Args:
            groups: The cached groups, in order.
            anchors: The noise levels of their anchors.
            sigma: That of the step.
        """
        shares: FloatArray = np.ones(len(groups))
        since = np.asarray(anchors) - sigma
        for g, h in itertools.combinations(range(len(groups)), 2):
            part = min(1.0, float(since[h] / since[g]))
            shares[g] *= 1 - part * (1 - self.keeps[groups[g], groups[h]])
            shares[h] *= 1 - part * (1 - self.keeps[groups[h], groups[g]])
        return shares
