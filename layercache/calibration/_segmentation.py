"""Groups of neighbouring blocks that behave alike, found from one group a block.

A group has one schedule for all its blocks, which suits them if caching each of them costs about
the same error for a millisecond saved, at the same steps. Block b is described by the curve

    c_b(t) = log( mean over prompts of ||D[t, b, 1]||^2 / ms_b ),

the squared error of the velocity when the block is reused from the step before, per millisecond of
the block. The groups are the contiguous segments S with the least

    sum over S, sum over b in S of  ms_b ||c_b - m_S||^2,    m_S = sum_b ms_b c_b / sum_b ms_b,

in which a block counts by its share of the time. An exact dynamic programme finds them (W. D.
Fisher, "On grouping for maximum homogeneity", 1958, who has weights as well); with equal weights,
that sum is the criterion that Ward's constrained clustering lowers greedily.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from layercache.errors import StatsError
from layercache.stats import CalibrationStats, Group


def alike_groups(stats: CalibrationStats, count: int) -> tuple[Group, ...]:
    """`count` groups of neighbouring blocks with a similar error per millisecond.

    Args:
        stats: Statistics with one group a block.
        count: How many groups, at least one a block list.

    Raises:
        StatsError: There are fewer block lists or blocks than that asks for.
    """
    lists: dict[str, int] = {}
    for group in stats.groups:
        if group.stop - group.start != 1 or group.start != lists.get(group.block_list, 0):
            raise StatsError("groups can be found only from statistics with one group a block")
        lists[group.block_list] = group.stop
    squares = (stats.deltas[:, 1:, :, 0].astype(np.float64) ** 2).sum(axis=-1).mean(axis=0)
    # A block too fast to be timed would have an infinite error per millisecond, and no weight.
    times = np.maximum(stats.group_ms, 1e-6 * stats.group_ms.sum())
    curves = np.log(np.maximum(squares.T, 1e-60)) - np.log(times)[:, None]  # (blocks, T-1)
    return segments(lists, curves, times, count)


def segments(
    block_lists: Mapping[str, int],
    curves: NDArray[np.float64],
    weights: NDArray[np.float64],
    count: int,
) -> tuple[Group, ...]:
    """The best `count` contiguous segments; none crosses from one block list into another.

    Args:
        block_lists: Blocks of each list, in execution order.
        curves: (blocks, F) one row of features a block, in execution order.
        weights: (blocks,) how much each block counts, above 0; their scale does not matter.
        count: How many segments.

    Raises:
        StatsError: `count` does not lie between the number of lists and that of blocks.

    Example:
        >>> curves = np.array([[0.0], [0.1], [5.0], [5.1], [5.2], [9.0]])
        >>> [g.name for g in segments({"blocks": 6}, curves, np.ones(6), 3)]
        ['blocks[0:2]', 'blocks[2:5]', 'blocks[5:6]']
    """
    total = sum(block_lists.values())
    if not len(block_lists) <= count <= total:
        raise StatsError(
            f"groups=auto:{count}; this model has {len(block_lists)} block lists with {total} "
            f"blocks in all, so a number from {len(block_lists)} to {total} is needed"
        )
    owner = [(name, place) for name, size in block_lists.items() for place in range(size)]
    within = _within(curves, weights)
    for start in range(total):
        for stop in range(start + 1, total + 1):
            if owner[start][0] != owner[stop - 1][0]:
                within[start, stop] = np.inf
    best = np.full((count + 1, total + 1), np.inf)
    best[0, 0] = 0.0
    cut = np.zeros((count + 1, total + 1), dtype=int)
    for used in range(1, count + 1):
        for stop in range(used, total + 1):
            options = best[used - 1, :stop] + within[:stop, stop]
            cut[used, stop] = int(np.argmin(options))
            best[used, stop] = options[cut[used, stop]]
    edges = [total]
    for used in range(count, 0, -1):
        edges.append(int(cut[used, edges[-1]]))
    found = []
    for start, stop in itertools.pairwise(reversed(edges)):
        name, first = owner[start]
        found.append(Group(block_list=name, start=first, stop=first + stop - start))
    return tuple(found)


def _within(curves: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, n+1) weighted sum of squared distances to their mean of the rows start..stop-1."""
    count = len(curves)
    total = np.concatenate([[0.0], np.cumsum(weights)])
    # Far from 0 the difference of squares below would lose its digits.
    centred = curves - weights @ curves / total[-1]
    weighted = weights[:, None] * centred
    sums = np.vstack([np.zeros(curves.shape[1]), np.cumsum(weighted, axis=0)])
    squares = np.concatenate([[0.0], np.cumsum((weighted * centred).sum(axis=1))])
    result = np.full((count, count + 1), np.inf)
    for start in range(count):
        stop = np.arange(start + 1, count + 1)
        mean = ((sums[stop] - sums[start]) ** 2).sum(axis=1) / (total[stop] - total[start])
        result[start, start + 1 :] = np.maximum(squares[stop] - squares[start] - mean, 0.0)
    return result
