"""What the error model fitted, written as the rows of a plan."""

from __future__ import annotations

from layercache.errors import LayerCacheError
from layercache.options import Options
from layercache.plan import COMPUTED, IDLE, SPANS, UnitPlan
from layercache.prediction import Fit
from layercache.stats import CalibrationStats


def rows_of(stats: CalibrationStats, options: Options, fit: Fit) -> tuple[UnitPlan, ...]:
    """A fitted schedule as the rows of a plan."""
    run, rows = fit.computed[:, 0], []
    if "step" in options.units or any(fit.taps):
        cells = "".join(COMPUTED if here else SPANS[0] for here in run)
        taps = fit.taps if any(fit.taps) else None
        rows.append(UnitPlan(kind="step", cells=cells, taps=taps))
    if "groups" in options.units:
        for index in range(stats.num_groups):
            rows.append(_group_row(stats, fit, index))
    return tuple(rows)


def _group_row(stats: CalibrationStats, fit: Fit, index: int) -> UnitPlan:
    symbols, taps = [], []
    done: list[int] = []
    for step, here in enumerate(fit.computed[:, 1 + index].tolist()):
        row: tuple[float, ...] = ()
        if here:
            symbols.append(COMPUTED)
            done.append(step)
        elif not fit.computed[step, 0]:
            symbols.append(IDLE)
        else:
            cell = fit.cells[index][step]
            read = [h for h, tap in enumerate(cell.taps) if tap]
            span = done[-1] - done[-2 - read[-1]] if read else 0
            if span >= len(SPANS):
                raise LayerCacheError(
                    f"{stats.groups[index].name}: a span of {span} steps has no symbol in a plan"
                )
            symbols.append(SPANS[span])
            row = () if cell.published or not read else cell.taps
        taps.append(row)
    group = stats.groups[index]
    return UnitPlan(
        kind="group",
        block_list=group.block_list,
        start=group.start,
        stop=group.stop,
        cells="".join(symbols),
        taps=tuple(taps) if any(taps) else None,
    )
