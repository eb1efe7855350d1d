"""Pictures of the bench: curves over measured speed, and sheets of images at equal speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from bench.comparison.equal_speed import Curve, Point, pareto_front
from bench.comparison.results import OURS, PUBLISHED, ScenarioResult
from layercache.evaluation._compare import Comparison, Row
from layercache.evaluation._sheets import image_sheet
from layercache.evaluation.plots import load_matplotlib, png_bytes

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
_SHEET_METHODS = 7


def speed_curves(curves: Mapping[str, Curve], targets: Sequence[float]) -> bytes:
    """PNG: mean and worst PSNR over measured speedup, every setting a mark, fronts as lines."""
    figure_class, _, _ = load_matplotlib()
    figure = figure_class(figsize=(13, 6), layout="constrained")
    axes = figure.subplots(1, 2)
    views: list[tuple[str, Callable[[Point], float]]] = [
        ("mean over prompts", lambda point: point.psnr_mean),
        ("worst prompt", lambda point: float(point.values["psnr"].min())),
    ]
    for axis, (title, value) in zip(axes, views, strict=True):
        for name, curve in curves.items():
            color, marker = STYLES.get(name, ("#334155", "x"))
            ours = name == OURS
            front = pareto_front(curve.points)
            axis.plot(
                [point.speedup for point in front],
                [value(point) for point in front],
                color=color,
                lw=2.4 if ours else 1.2,
                marker=marker,
                ms=7 if ours else 5,
                zorder=5 if ours else 3,
                label=name,
            )
            rest = [point for point in curve.points if point not in front]
            axis.scatter(
                [point.speedup for point in rest],
                [value(point) for point in rest],
                color=color,
                marker=marker,
                s=14,
                alpha=0.35,
                zorder=2,
            )
        for target in targets:
            axis.axvline(target, color="#cbd5e1", lw=0.8, zorder=1)
        axis.set_xscale("log")
        ticks = [1, 1.37, 1.71, 2, 3, 4, 5, 6]
        low, high = min(1.2, *targets), max(targets) * 1.3
        axis.set_xlim(low, high)
        inside = [
            value(point)
            for curve in curves.values()
            for point in curve.points
            if low <= point.speedup <= high
        ]
        if inside:
            axis.set_ylim(min(inside) - 2, max(inside) + 2)
        shown = [tick for tick in ticks if axis.get_xlim()[0] <= tick <= axis.get_xlim()[1]]
        axis.set_xticks(shown, [f"{tick:g}x" for tick in shown])
        axis.set_xticks([], minor=True)
        axis.set_xlabel("measured speedup of the whole generation")
        axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axis.grid(axis="y", color="#e2e8f0", lw=0.8)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_ylabel("PSNR to the uncached image, dB")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    return png_bytes(figure)


def equal_speed_sheet(
    result: ScenarioResult,
    references: Tensor,
    image_of: Callable[[str, str], Tensor],
    prompts: Sequence[str],
) -> bytes | None:
    """PNG sheet: at every second target, each method at its slowest setting that is fast enough.

    Args:
        result: What was measured.
        references: First uncached images.
        image_of: First images of a method at one of its settings.
        prompts: Their captions.

    Returns:
        None where no method reaches any target.
    """
    rows, images = [], {}
    targets = result.targets[::2]
    chosen = _shown(result, targets)
    for target in targets:
        readings = result.at(target)
        for name in chosen:
            if name not in readings:
                continue
            point = readings[name].between[1]
            images[name, target] = image_of(name, point.label)
            rows.append(
                Row(
                    method=name,
                    target_speedup=target,
                    compute_share=point.compute_share,
                    speedup_measured=point.speedup,
                    speedup_predicted=point.predicted_speedup,
                    psnr_mean=point.psnr_mean,
                    psnr_worst=float(point.values["psnr"].min()),
                    psnr_median=point.psnr_mean,
                    ssim_mean=float(point.values["ssim"].mean()),
                )
            )
    if not rows:
        return None
    comparison = Comparison(tuple(rows), references, images, result.uncached_seconds, 1)
    return image_sheet(
        comparison,
        prompts,
        count=len(references),
        heading_of=lambda target: f"at least {target:g}x measured",
    )


def _shown(result: ScenarioResult, targets: Sequence[float]) -> list[str]:
    """LayerCache, the published one, and the best others: most targets reached, then mean PSNR."""
    reached: dict[str, list[float]] = {}
    for target in targets:
        for name, reading in result.at(target).items():
            reached.setdefault(name, []).append(reading.mean())
    first = [name for name in (OURS, PUBLISHED) if name in reached]
    others = [name for name in reached if name not in first]
    others.sort(key=lambda name: (-len(reached[name]), -sum(reached[name])))
    return [*first, *others][:_SHEET_METHODS]
