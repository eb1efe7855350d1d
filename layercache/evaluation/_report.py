"""One HTML file that holds a comparison: table, pictures, plans. No scripts, nothing external."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from layercache.plan import Plan

if TYPE_CHECKING:
    from layercache.evaluation._compare import Comparison, Row

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f8fafc; color: #0f172a;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 30px; margin: 0 0 4px; letter-spacing: -0.02em; }
h2 { font-size: 20px; margin: 44px 0 10px; letter-spacing: -0.01em; }
p { max-width: 75ch; margin: 8px 0; color: #334155; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 14px;
  margin: 24px 0 8px; }
.card, .panel { background: #fff; border: 1px solid #e2e8f0; border-radius: 10px; }
.card { padding: 16px 18px; }
.card b { display: block; font-size: 30px; line-height: 1.15; color: #c2410c; }
.card span { color: #475569; font-size: 14px; }
.panel { padding: 14px; overflow-x: auto; }
.panel img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px; text-align: right; white-space: nowrap; }
th { color: #475569; font-weight: 600; font-size: 13px; border-bottom: 2px solid #cbd5e1; }
td { border-bottom: 1px solid #f1f5f9; }
th:first-child, td:first-child { text-align: left; }
tr.target td { padding-top: 16px; font-weight: 600; color: #0f172a; border-bottom-color: #cbd5e1; }
tr.ours td { background: #fff7ed; }
td.best { color: #c2410c; font-weight: 600; }
pre { margin: 0; font: 12px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; font-size: 14px; }
dt { color: #475569; }
dd { margin: 0; }
"""

_PICTURES = {
    "pareto": ("Quality against cost", ""),
    "plan": (
        "The compiled plans",
        "<p>One row a unit, one column a timestep. A number says how many earlier computed values "
        "a cell reads besides the last. Groups that run wherever the step does are left out.</p>",
    ),
    "sheet": (
        "Image sheet",
        "<p>The first held-out prompts, not selected, with the difference to the uncached image "
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
        "of transformer compute and the same held-out prompts and seeds, which no method was "
        "fitted to. Fidelity is measured against the uncached images.</p>",
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
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


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
