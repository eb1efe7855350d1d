"""Pictures of plans and of comparisons, as PNG bytes (needs matplotlib)."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from layercache.errors import LayerCacheError
from layercache.plan import COMPUTED, IDLE, SPANS, Plan

if TYPE_CHECKING:
    from layercache.evaluation._compare import Comparison

STYLES: dict[str, tuple[str, str]] = {
    "layercache": ("#c2410c", "o"),
    "layercache-published": ("#ca8a04", "s"),
    "meancache": ("#1d4ed8", "^"),
    "uniform": ("#64748b", "v"),
    "fewer-steps": ("#15803d", "D"),
    "non-stationary": ("#7e22ce", "P"),
    "dpcache": ("#0891b2", "<"),
    "lemica": ("#65a30d", ">"),
    "magcache": ("#be185d", "X"),
    "taylorseer": ("#4338ca", "p"),
    "seacache": ("#0d9488", "h"),
    "first-block-cache": ("#a16207", "d"),
    "cache-dit": ("#e11d48", "1"),
    "cache-dit-taylorseer": ("#fb7185", "2"),
    "cache-dit-mask": ("#9f1239", "3"),
}
"""Colour and marker of each method, the same in every picture."""

_COMPUTED, _REUSED, _PREDICTED, _CORRECTED, _SKIPPED = range(5)
_CELLS = {
    _COMPUTED: ("#1e293b", "computed"),
    _CORRECTED: ("#475569", "computed, then corrected with earlier outputs"),
    _PREDICTED: ("#fdba74", "predicted along the trajectory"),
    _REUSED: ("#fef3c7", "reused as it was"),
    _SKIPPED: ("#ffffff", "the whole step is skipped"),
}


def plan_heat_map(plans: Mapping[str, Plan]) -> bytes:
    """Draw each plan as a grid, timestep by unit; predicted cells bear their span K.

    Cells of multistep rows have no span.

    Args:
        plans: Plans by title.
    """
    figure_class, colors, patches = load_matplotlib()
    heights = [len(plan.units) for plan in plans.values()]
    figure = figure_class(
        figsize=(13, 1.5 + sum(0.36 * h + 0.95 for h in heights)), layout="constrained"
    )
    axes = figure.subplots(len(plans), 1, squeeze=False, height_ratios=[h + 1.6 for h in heights])
    palette = colors.ListedColormap([_CELLS[i][0] for i in range(len(_CELLS))])
    for axis, (title, plan) in zip(axes[:, 0], plans.items(), strict=True):
        axis.pcolormesh(
            _cells(plan), cmap=palette, vmin=0, vmax=len(_CELLS) - 1, edgecolors="#cbd5e1", lw=0.6
        )
        for row, unit in enumerate(plan.units):
            for step, symbol in enumerate(unit.cells):
                if symbol in SPANS[1:]:
                    axis.text(
                        step + 0.5,
                        row + 0.52,
                        str(SPANS.index(symbol)),
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="#7c2d12",
                    )
        axis.set_yticks(
            np.arange(len(plan.units)) + 0.5,
            [f"{u.name}  ({u.cells.count(COMPUTED)} of {plan.num_steps})" for u in plan.units],
            fontsize=9,
        )
        axis.invert_yaxis()
        ticks = np.arange(0, plan.num_steps, max(1, plan.num_steps // 10))
        axis.set_xticks(ticks + 0.5, [f"{t}\nσ {plan.sigmas[t]:.2f}" for t in ticks], fontsize=8)
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
        psnr = plan.predicted.psnr_db
        expected = "" if psnr is None else f", predicted PSNR {psnr:.1f} dB"
        axis.set_title(
            f"{title}: {100 * plan.predicted.compute_share:.1f} % of the compute{expected}",
            loc="left",
            fontsize=11,
            fontweight="bold",
        )
    used = {int(c) for plan in plans.values() for c in np.unique(_cells(plan))}
    handles = [
        patches.Patch(facecolor=color, edgecolor="#cbd5e1", label=label)
        for kind, (color, label) in _CELLS.items()
        if kind in used
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return png_bytes(figure)


def _cells(plan: Plan) -> np.ndarray[Any, np.dtype[np.int64]]:
    grid = np.zeros((len(plan.units), plan.num_steps), dtype=np.int64)
    for row, unit in enumerate(plan.units):
        schedule = plan.schedules[unit.name]
        for step, symbol in enumerate(unit.cells):
            # The step unit has its taps where it is computed, a group where it is cached.
            read = schedule.reads[step]
            if symbol == COMPUTED:
                grid[row, step] = _CORRECTED if read else _COMPUTED
            elif symbol == IDLE:
                grid[row, step] = _SKIPPED
            else:
                taps = schedule.reads[schedule.anchor[step]] if unit.kind == "step" else read
                grid[row, step] = _PREDICTED if taps else _REUSED
    return grid


def pareto(comparison: Comparison) -> bytes:
    """Mean PSNR against the share of compute, and against the measured speedup."""
    figure_class, _, _ = load_matplotlib()
    figure = figure_class(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for method in dict.fromkeys(row.method for row in comparison.rows):
        rows = [row for row in comparison.rows if row.method == method]
        color, marker = STYLES.get(method, ("#7e22ce", "x"))
        style = {
            "color": color,
            "marker": marker,
            "label": method,
            "lw": 1.6,
            "ms": 6,
            "zorder": 5 if method == "layercache" else 3,
        }
        psnrs = [row.psnr_mean for row in rows]
        left.plot([100 * row.compute_share for row in rows], psnrs, **style)
        right.plot([row.speedup_measured for row in rows], psnrs, **style)
        worst = [row.psnr_mean - row.psnr_worst for row in rows]
        left.errorbar(
            [100 * row.compute_share for row in rows],
            psnrs,
            yerr=[worst, [0.0] * len(rows)],
            fmt="none",
            ecolor=color,
            elinewidth=0.8,
            alpha=0.5,
        )
    left.invert_xaxis()
    left.set_xlabel("transformer compute, % of the uncached run (whiskers: worst image)")
    right.set_xlabel("measured speedup of the whole generation")
    left.set_ylabel("PSNR to the uncached image, dB")
    for axis in (left, right):
        axis.grid(color="#e2e8f0", lw=0.8)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    left.legend(frameon=False, fontsize=9)
    return png_bytes(figure)


def load_matplotlib() -> tuple[Any, Any, Any]:
    """The parts that are used, without pyplot and its global state."""
    try:
        from matplotlib import colors, patches
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LayerCacheError(
            "pictures need matplotlib, which is not installed: pip install 'layercache-flow[plot]'"
        ) from error
    return Figure, colors, patches


def png_bytes(figure: Any) -> bytes:
    """The figure as a PNG on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, facecolor="white")
    return buffer.getvalue()
