"""One HTML file that holds a comparison: table, pictures, plans. No scripts, nothing external."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from layercache.plan import Plan

if TYPE_CHECKING:
    from layercache.evaluation._compare import Comparison, Row

_PICTURES = {
    "pareto": ("Quality against cost", ""),
    "plan": (
        "The compiled plans",
        "<p>One row a unit, one column a timestep. A number says how many earlier computed values "
        "a cell reads besides the last. Groups that run wherever the step does are left out.</p>",
    ),
    "sheet": (
        "Image sheet",
        "<p>The first prompts, not selected, with the difference to the uncached image "
        "amplified under each.</p>",
    ),
}
"""Of each picture, by name: the heading, and what is said of it."""


def html_report(
    comparison: Comparison,
    plans: Mapping[float, Plan],
    pictures: Mapping[str, bytes],
    facts: Mapping[str, str],
    *,
    title: str = "LayerCache report",
) -> str:
    """The page: the table, the plans of each target, those of `_PICTURES` that are given, facts."""
    sections = [
        f"<h1>{escape(title)}</h1>",
        "<p>A plan decides, for every timestep and every group of transformer blocks, what is "
        "computed and what is predicted from earlier steps. Each method below had the same budget "
        "of transformer compute and the same prompts and seeds; figures are fair where no method "
        "was fitted to those. Fidelity is measured against the uncached images.</p>",
        f'<div class="cards">{_cards(comparison)}</div>',
        "<h2>All methods at equal compute</h2>",
        f'<div class="panel">{_table(comparison)}</div>',
        "<p>Speedup is the median wall-clock time of the uncached pipeline over that of the "
        "method, timed in turns within one run. PSNR is computed in float on clamped images; "
        "“worst” is the worst single image. The best of each target is bold.</p>",
    ]
    if comparison.doubts:
        doubts = "<br>".join(escape(line) for line in comparison.doubts)
        sections.append(f"<p><b>Some timings cannot be right</b><br>{doubts}</p>")
    for name, (heading, words) in _PICTURES.items():
        if name in pictures:
            sections += [f"<h2>{heading}</h2>", words, picture_panel(pictures[name], heading)]
    text = "\n\n".join(plan.summary() for plan in plans.values())
    sections.append(f'<h2>Plans as text</h2><div class="panel"><pre>{escape(text)}</pre></div>')
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    sections += ["<h2>How this was measured</h2>", f'<div class="panel"><dl>{rows}</dl></div>']
    return html_page(title, sections)


def html_page(title: str, sections: Iterable[str]) -> str:
    """A complete page in the reports' style around sections of HTML."""
    page = files("layercache.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    return page.replace("{{title}}", escape(title)).replace("{{sections}}", "\n".join(sections))


def _cards(comparison: Comparison) -> str:
    cards = []
    for target in comparison.targets:
        rows = {row.method: row for row in comparison.at(target)}
        ours, rival = rows.get("layercache"), rows.get("meancache")
        if ours is None:
            continue
        margin = (
            "" if rival is None else f", {ours.psnr_mean - rival.psnr_mean:+.1f} dB to MeanCache"
        )
        cards.append(
            f'<div class="card"><b>{ours.psnr_mean:.1f} dB</b>'
            f"<span>at 1/{target:g} of the compute: {_speed(ours)}{margin}</span></div>"
        )
    return "".join(cards)


def _table(comparison: Comparison) -> str:
    head = "".join(
        f"<th>{name}</th>"
        for name in ("method", "compute", "speedup", "predicted", "PSNR mean", "PSNR worst", "SSIM")
    )
    body = []
    for target in comparison.targets:
        rows = comparison.at(target)
        body.append(
            f'<tr class="target"><td colspan="7">{target:g}x less transformer compute</td></tr>'
        )
        body += [_table_row(row, rows) for row in rows]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _speed(row: Row) -> str:
    return "speed unclear" if row.timing_doubt else f"{row.speedup_text} measured speed"


def _qualities(row: Row) -> tuple[str, ...]:
    ssim = "-" if row.ssim_mean is None else f"{row.ssim_mean:.4f}"
    return f"{row.psnr_mean:.1f} dB", f"{row.psnr_worst:.1f} dB", ssim


def _table_row(row: Row, rivals: Sequence[Row]) -> str:
    kind = ' class="ours"' if row.method == "layercache" else ""
    # Cells are marked where they lead, as they are shown: equal ones lead together.
    best = (
        _qualities(max(rivals, key=lambda r: r.psnr_mean))[0],
        _qualities(max(rivals, key=lambda r: r.psnr_worst))[1],
        _qualities(max(rivals, key=lambda r: r.ssim_mean or 0.0))[2],
    )
    cells = "".join(
        f'<td class="best">{text}</td>' if text == top != "-" else f"<td>{text}</td>"
        for text, top in zip(_qualities(row), best, strict=True)
    )
    predicted = "-" if row.speedup_predicted is None else f"{row.speedup_predicted:.2f}x"
    return (
        f"<tr{kind}><td>{escape(row.method)}</td><td>{100 * row.compute_share:.1f} %</td>"
        f"<td>{row.speedup_text}</td><td>{predicted}</td>{cells}</tr>"
    )


def picture_panel(png: bytes, alternative: str) -> str:
    """A panel with a picture that is part of the page."""
    data = base64.b64encode(png).decode("ascii")
    return (
        f'<div class="panel"><img alt="{escape(alternative)}" '
        f'src="data:image/png;base64,{data}"></div>'
    )
