"""Pictures of plans and of comparisons, as PNG bytes (needs matplotlib)."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from layercache.errors import LayerCacheError
from layercache.plan import COMPUTED, IDLE, Plan, UnitPlan

if TYPE_CHECKING:
    from layercache.evaluation._compare import Comparison, Row

OURS = "layercache"
# Okabe and Ito's colours, which stay apart for colour-blind eyes and in grey.
_ORANGE, _BLUE = "#d55e00", "#0072b2"
_INK, _FAINT = "#1e293b", "#cbd5e1"
_COLUMNS = 4

_COMPUTED, _CACHED, _SKIPPED = range(3)
_CELLS = {
    _COMPUTED: (_INK, "computed"),
    _CACHED: ("#f6c28b", "predicted from earlier values"),
    _SKIPPED: ("#ffffff", "nothing to do: the step is skipped"),
}
_TAPS = "n   reads n earlier values besides the last"


def plan_heat_map(plans: Mapping[str, Plan]) -> bytes:
    """Draw each plan as a grid, timestep by unit, with how many taps a prediction has.

    Groups that run wherever the step does have no row of their own: it would repeat the step's.

    Args:
        plans: Plans by title.
    """
    figure_class, colors, patches = load_matplotlib()
    rows = {title: _rows(plan) for title, plan in plans.items()}
    heights = [len(shown) for shown in rows.values()]
    figure = figure_class(
        figsize=(13, 0.9 + sum(0.42 * h + 0.95 for h in heights)), layout="constrained"
    )
    axes = figure.subplots(len(plans), 1, squeeze=False, height_ratios=[h + 1.2 for h in heights])
    palette = colors.ListedColormap([_CELLS[i][0] for i in range(len(_CELLS))])
    used: set[int] = set()
    for axis, (title, plan) in zip(axes[:, 0], plans.items(), strict=True):
        units = rows[title]
        grid = np.array([_cells(plan, unit) for unit in units])
        used |= set(np.unique(grid).tolist())
        axis.pcolormesh(grid, cmap=palette, vmin=0, vmax=len(_CELLS) - 1, edgecolors="w", lw=1.2)
        for row, unit in enumerate(units):
            for step, read in enumerate(plan.schedules[unit.name].reads):
                if read:
                    color = "#ffffff" if grid[row, step] == _COMPUTED else "#7c2d12"
                    place = {"ha": "center", "va": "center", "fontsize": 8, "color": color}
                    axis.text(step + 0.5, row + 0.52, str(len(read)), **place)
        labels = [
            f"{unit.name}\n{unit.cells.count(COMPUTED)} of {plan.num_steps}" for unit in units
        ]
        axis.set_yticks(np.arange(len(units)) + 0.5, labels, fontsize=10)
        axis.invert_yaxis()
        ticks = np.arange(0, plan.num_steps, max(1, plan.num_steps // 10))
        axis.set_xticks(ticks + 0.5, [f"{t}\nσ {plan.sigmas[t]:.2f}" for t in ticks], fontsize=9)
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
        psnr = plan.predicted.psnr_median_db
        expected = "" if psnr is None else f", {psnr:.1f} dB foretold"
        share = f"{100 * plan.predicted.compute_share:.0f} % of the compute"
        axis.set_title(f"{title}: {share}{expected}", loc="left", fontsize=13, fontweight="bold")
    handles = [
        patches.Patch(facecolor=color, edgecolor=_FAINT, label=label)
        for kind, (color, label) in _CELLS.items()
        if kind in used
    ]
    handles.append(patches.Patch(facecolor="none", edgecolor="none", label=_TAPS))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=11)
    return png_bytes(figure)


def _rows(plan: Plan) -> list[UnitPlan]:
    """The rows that tell something: the step's, and those of groups that are cached somewhere."""
    cached = [unit for unit in plan.groups if any(plan.schedules[unit.name].cached)]
    step = [] if plan.step_unit is None else [plan.step_unit]
    return step + cached or list(plan.units[:1])


def _cells(plan: Plan, unit: UnitPlan) -> list[int]:
    known = {COMPUTED: _COMPUTED, IDLE: _SKIPPED}
    return [known.get(symbol, _CACHED) for symbol in unit.cells]


def pareto(comparison: Comparison) -> bytes:
    """PSNR over measured speedup, a small picture for each rival beside LayerCache.

    Lines join means; faint dots are single images. Timings that cannot be right are left out.
    """
    figure_class, _, _ = load_matplotlib()
    methods = list(dict.fromkeys(row.method for row in comparison.rows))
    rivals: list[str | None] = [name for name in methods if name != OURS]
    panels = rivals or [None]
    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure = figure_class(figsize=(max(7.0, 3.3 * columns), 3.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, rival in zip(axes, panels, strict=False):
        for name, color, marker in ((rival, _BLUE, "s"), (OURS, _ORANGE, "o")):
            rows = [r for r in comparison.rows if r.method == name and not r.timing_doubt]
            speeds = [row.speedup_measured for row in rows]
            for row, speed in zip(rows, speeds, strict=True):
                values = image_psnr(comparison, row)
                axis.scatter([speed] * len(values), values, s=9, color=color, alpha=0.25, lw=0)
            means = [row.psnr_mean for row in rows]
            axis.plot(speeds, means, color=color, marker=marker, lw=2, ms=6)
        title = {"fontsize": 11, "loc": "left", "fontweight": "bold"}
        axis.set_title(rival or OURS, color=_BLUE if rival else _ORANGE, **title)
        axis.grid(color="#e2e8f0", lw=0.8)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.supylabel("PSNR to the uncached image, dB", fontsize=11)
    figure.supxlabel("measured speedup of the whole generation", fontsize=11)
    if rivals:
        text = "LayerCache (orange) and each rival (blue): lines join means, dots are single images"
        figure.suptitle(text, fontsize=11, x=0.01, ha="left")
    return png_bytes(figure)


def image_psnr(comparison: Comparison, row: Row) -> list[float]:
    """PSNR in dB of every image of a row; none where nothing was decoded."""
    from layercache.evaluation.metrics import psnr

    images = comparison.images.get((row.method, row.target_speedup))
    if images is None or not comparison.decoded:
        return []
    values: list[float] = psnr(images, comparison.references).tolist()
    return values


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
