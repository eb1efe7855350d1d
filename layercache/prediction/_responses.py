"""What cached groups do to one another: the answer of a later group to an earlier one.

Where group h is cached, the groups after it see another input and answer to it; their answer is
part of the measured change delta_h. Of a cached group g after it, that answer is not computed. What
it adds instead are residuals of earlier steps a_k, each with the answer to whatever h did *there*.
So with x_h(t) the change of the velocity by group h at step t (0 where it is computed),

    x_g(t) = delta_g(t) + sum_{h<g} R_gh [ sum_k c_k x_h(a_k) - x_h(t) ],

c_k the shares of the taps, and R_gh the answer. Calibration measured it at a few steps,
R_gh x = D_h + D_g - D_hg for x = D_h: its part along x, <R x, x> / ||x||^2, goes into the mean, and
what is left of ||R x||^2 / ||x||^2 into the variance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from layercache.prediction._cells import Cell
from layercache.stats import CalibrationStats, FloatArray

CachedCells = Sequence[tuple[int, tuple[int, ...], Cell]]
"""(group, steps read, cell) of the groups that are cached at one step, in order."""


class Responses:
    """The answers of each group to those before it, between the measured noise levels too.

    Args:
        stats: Calibration statistics; of all prompts together.

    Attributes:
        along: (T, G, G) of the row's group to the column's: the part along its change.
        across: (T, G, G) squared norm of the rest, per squared norm of the change.
    """

    def __init__(self, stats: CalibrationStats) -> None:
        steps, groups = stats.num_steps, stats.num_groups
        self.along: FloatArray = np.zeros((steps, groups, groups))
        self.across: FloatArray = np.zeros((steps, groups, groups))
        inner, answer, change = np.moveaxis(stats.responses.sum(axis=0), -1, 0)
        sigmas, known = stats.sigmas[:-1], stats.response_sigmas
        for index, (earlier, later) in enumerate(zip(*np.triu_indices(groups, 1), strict=True)):
            # A group that changes nothing needs no answer.
            found = np.flatnonzero(change[:, index] > 0)[::-1]
            if not len(found):
                continue
            share = inner[found, index] / change[found, index]
            rest = np.maximum(answer[found, index] / change[found, index] - share**2, 0.0)
            self.along[:, later, earlier] = np.interp(sigmas, known[found], share)
            self.across[:, later, earlier] = np.interp(sigmas, known[found], rest)

    def changes(
        self, step: int, cells: CachedCells, before: Mapping[int, FloatArray]
    ) -> tuple[FloatArray, FloatArray]:
        """Changes x (G, P, N) of a step, and (P,) the variance of their sum.

        Args:
            step: t.
            cells: What is cached there, at least one group.
            before: x of the steps before at which groups were cached.
        """
        shape = self.along.shape[1], *cells[0][2].delta.shape
        changes: FloatArray = np.zeros(shape)
        unsure: FloatArray = np.zeros(shape[1])
        for group, sources, cell in cells:
            changes[group] = cell.delta
            if group == 0:
                continue
            apart = -changes[:group]
            for source, share in zip(sources, cell.shares, strict=False):
                if source in before:
                    apart += share * before[source][:group]
            flat = apart.reshape(group, -1)
            changes[group] += (self.along[step, group, :group] @ flat).reshape(shape[1:])
            unsure += self.across[step, group, :group] @ np.einsum("hpn,hpn->hp", apart, apart)
        return changes, unsure
