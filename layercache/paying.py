"""Does caching layers pay on this model? The error of caching a group over that of skipping a step.

At every step t, with all else computed: E_g[t], the mean over prompts of the squared change of the
velocity when group g is predicted from its residuals at the steps t-1, t-2, t-3, and E[t], that of
predicting the whole velocity from as many, both with fitted taps (`ridge`). An error counts by what
it does to the image, w_t = ((sigma_t - sigma_{t+1}) A_t)^2, so over a stretch of steps

    ratio_g = sum_t w_t E_g[t] / sum_t w_t E[t].

To cache a group saves its share of the step's time. *Ratio below share* means that milliseconds are
bought more cheaply by caching the group than by skipping steps.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from layercache.costs import cell_ms
from layercache.prediction import GroupCells
from layercache.prediction.ridge import LeastSquares
from layercache.stats import CalibrationStats, FloatArray

TAPS = 2
STRETCHES = 3


@dataclass(frozen=True, eq=False)
class Paying:
    """What caching each group costs and saves.

    Attributes:
        groups: Names of the G groups.
        share: (G,) of the time of a computed step.
        cached: (T, G) weighted squared errors w_t E_g[t]; 0 where nothing can be cached.
        skipped: (T,) weighted squared errors w_t E[t] of skipping the step.
        sigmas: (T+1,) noise levels.
    """

    groups: tuple[str, ...]
    share: FloatArray
    cached: FloatArray
    skipped: FloatArray
    sigmas: FloatArray

    @property
    def ratio(self) -> FloatArray:
        """(G,) over all steps."""
        return _over(self.cached.sum(axis=0), self.skipped.sum())

    @property
    def map(self) -> FloatArray:
        """(T, G) of each step by itself."""
        return _over(self.cached, self.skipped[:, None])

    def stretches(self, count: int = STRETCHES) -> list[tuple[float, float, FloatArray]]:
        """Equal parts of the steps: the noise level at both ends, and (G,) the ratio."""
        edges = np.linspace(0, len(self.skipped), count + 1).round().astype(int)
        return [
            (
                float(self.sigmas[a]),
                float(self.sigmas[b]),
                _over(self.cached[a:b].sum(axis=0), self.skipped[a:b].sum()),
            )
            for a, b in itertools.pairwise(edges)
            if b > a
        ]

    def table(self) -> str:
        """The answer for a person."""
        parts = self.stretches()
        heads = [f"σ {high:.2f} to {low:.2f}" for high, low, _ in parts]
        width = max((len(name) for name in self.groups), default=5)
        lines = [
            "error of caching a group over that of skipping the step; it pays below the share (*)",
            f"  {'group':<{width}}  {'share':>6}  {'all':>6}"
            + "".join(f"  {head:>16}" for head in heads),
        ]
        for index, name in enumerate(self.groups):
            share = float(self.share[index])
            cells = [f"{self.ratio[index]:>6.2f}"]
            cells += [f"{ratio[index]:.2f}{_mark(ratio[index], share)}" for _, _, ratio in parts]
            lines.append(
                f"  {name:<{width}}  {share:>6.2f}  {cells[0]}"
                + "".join(f"  {cell:>16}" for cell in cells[1:])
            )
        paying = [n for n, r, s in zip(self.groups, self.ratio, self.share, strict=True) if r < s]
        if paying:
            lines.append(f"  caching pays on {', '.join(paying)} over all steps")
        else:
            lines.append("  over all steps, skipping whole steps is the better use of time")
        return "\n".join(lines)


def paying(stats: CalibrationStats) -> Paying:
    """Measure it in calibration statistics; needs no run.

    Example:
        >>> print(paying(stats).table())  # doctest: +SKIP
    """
    steps, groups = stats.num_steps, stats.num_groups
    cells = GroupCells(stats, np.asarray(stats.deltas), "fitted", quick=False)
    velocities = np.asarray(stats.velocities, dtype=np.float64).swapaxes(0, 1)
    weights = (np.diff(stats.sigmas) * stats.propagation) ** 2
    begins = np.flatnonzero(np.diff(stats.segments, prepend=-1) > 0)
    cached, skipped = np.zeros((steps, groups)), np.zeros(steps)
    for step in range(1, steps):
        first = int(begins[begins <= step][-1])
        sources = tuple(range(step - 1, max(first, step - 2 - TAPS) - 1, -1))
        if not sources:
            continue
        skipped[step] = weights[step] * _skipping(velocities, step, sources)
        for group in range(groups):
            near = tuple(s for s in sources if step - s <= stats.max_lag)
            cached[step, group] = weights[step] * float(
                (cells.cell(step, group, near).size ** 2).mean()
            )
    times = cell_ms(stats)
    share: FloatArray = times[:, :groups].sum(axis=0) / max(float(times.sum()), 1e-300)
    names = tuple(group.name for group in stats.groups)
    return Paying(names, share, cached, skipped, np.asarray(stats.sigmas, dtype=np.float64))


def _skipping(velocities: FloatArray, step: int, sources: tuple[int, ...]) -> float:
    """Mean squared error of a velocity that is predicted from those of earlier steps."""
    rest = velocities[sources[0]] - velocities[step]
    moves = velocities[sources[0]] - velocities[list(sources[1:])]
    if len(moves):
        loud = np.einsum("pn,pn->p", velocities[step], velocities[step])
        taps = LeastSquares.of(rest, moves, np.zeros(len(moves)), loud).fit()
        rest = rest + (taps @ moves.reshape(len(moves), -1)).reshape(rest.shape)
    return float(np.einsum("pn,pn->p", rest, rest).mean())


def _mark(ratio: float, share: float) -> str:
    return " *" if ratio < share else "  "


def _over(above: FloatArray, below: FloatArray) -> FloatArray:
    result: FloatArray = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    return result
