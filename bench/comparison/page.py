"""One HTML file with all that the bench found. No scripts, nothing external."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from bench.comparison.goals import goals
from bench.comparison.metrics import bootstrap_interval
from bench.comparison.results import (
    MEAN_CACHE,
    OURS,
    ScenarioResult,
    best_rival,
    margins,
)
from layercache.evaluation._report import html_page, picture_panel

TITLE = "LayerCache against every rival, at equal measured speed"


def bench_page(results: Sequence[ScenarioResult], pictures: Mapping[str, bytes]) -> str:
    """Build the page.

    Args:
        results: One a scenario.
        pictures: PNG bytes by `"curves-NAME"` and `"sheet-NAME"` with the scenario's name.
    """
    sections = [
        f"<h1>{escape(TITLE)}</h1>",
        "<p>Every method ran on the same held-out prompts and seeds, in one run, each swept over "
        "its own settings, which were chosen on other prompts. It is read at the measured speedup "
        "that is compared, on the straight line in log(speedup) between two neighbouring settings "
        "of its own. Fidelity is that to the uncached image of the same seed.</p>",
    ]
    for result in results:
        sections += _scenario(result, pictures)
    return html_page(TITLE, sections)


def _scenario(result: ScenarioResult, pictures: Mapping[str, bytes]) -> list[str]:
    name = result.scenario.name
    sections = [
        f"<h2>{escape(result.scenario.title)}</h2>",
        f'<div class="cards">{"".join(_card(result, target) for target in result.targets)}</div>',
    ]
    if f"curves-{name}" in pictures:
        sections.append(picture_panel(pictures[f"curves-{name}"], "Quality over measured speed"))
    sections += [
        f'<div class="panel">{_table(result)}</div>',
        "<p>The interval is a 95 % bootstrap interval of the mean over prompts; “worst” is the "
        "worst single image.</p>",
        "<h2>Goals</h2>",
        f'<div class="panel">{_goals(result)}</div>',
        "<h2>Margins</h2>",
        f'<div class="panel">{_margins(result)}</div>',
    ]
    if f"sheet-{name}" in pictures:
        sections += [
            "<h2>Images</h2>",
            "<p>The first held-out prompts, not selected, each method at its slowest setting that "
            "is at least as fast as the heading says; below, the difference to the uncached "
            "image, amplified.</p>",
            picture_panel(pictures[f"sheet-{name}"], "Image sheet"),
        ]
    sections += ["<h2>Every setting</h2>", f'<div class="panel">{_settings(result)}</div>']
    if result.skipped:
        skipped = "".join(
            f"<dt>{escape(family)}</dt><dd>{escape(why)}</dd>"
            for family, why in result.skipped.items()
        )
        sections += ["<h2>Not run</h2>", f'<div class="panel"><dl>{skipped}</dl></div>']
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in result.facts.items())
    sections += ["<h2>How this was measured</h2>", f'<div class="panel"><dl>{facts}</dl></div>']
    return sections


def _card(result: ScenarioResult, target: float) -> str:
    readings = result.at(target)
    if OURS not in readings:
        return ""
    ours = readings[OURS].mean()
    notes = [
        f"{ours - readings[rival].mean():+.1f} dB to {escape(rival)}"
        for rival in dict.fromkeys((best_rival(readings), MEAN_CACHE))
        if rival is not None and rival in readings
    ]
    return (
        f'<div class="card"><b>{ours:.1f} dB</b><span>at {target:g}x measured speed<br>'
        f"{'<br>'.join(notes)}</span></div>"
    )


def _table(result: ScenarioResult) -> str:
    head = "".join(
        f"<th>{text}</th>"
        for text in ("method", "PSNR mean", "interval", "median", "worst", "SSIM", "compute")
    )
    body = []
    for target in result.targets:
        readings = result.at(target)
        body.append(f'<tr class="target"><td colspan="7">{target:g}x measured speedup</td></tr>')
        ranked = sorted(readings, key=lambda name: -readings[name].mean())
        for rank, name in enumerate(ranked):
            reading = readings[name]
            low, high = bootstrap_interval(reading.values["psnr"].tolist())
            kind = ' class="ours"' if name == OURS else ""
            mark = ' class="best"' if rank == 0 else ""
            body.append(
                f"<tr{kind}><td>{escape(name)}</td><td{mark}>{reading.mean():.1f} dB</td>"
                f"<td>{low:.1f} to {high:.1f}</td><td>{reading.psnr_median:.1f} dB</td>"
                f"<td>{reading.psnr_worst:.1f} dB</td><td>{reading.mean('ssim'):.4f}</td>"
                f"<td>{100 * reading.compute_share:.1f} %</td></tr>"
            )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _goals(result: ScenarioResult) -> str:
    head = "".join(f"<th>{text}</th>" for text in ("", "at", "at least", "measured", "met"))
    body = "".join(
        f"<tr><td>{escape(goal.what)}</td><td>{goal.target_speedup:g}x</td><td>{goal.least:g}</td>"
        f"<td>{goal.text}</td><td>{'yes' if goal.met else 'no'}</td></tr>"
        for goal in goals(result)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _margins(result: ScenarioResult) -> str:
    head = "".join(
        f"<th>{text}</th>" for text in ("", "at", "mean PSNR", "interval", "worst prompt", "SSIM")
    )
    body = []
    for target in result.targets:
        for margin in margins(result, target):
            best = " (best rival)" if margin["against_is_best_rival"] else ""
            body.append(
                f"<tr><td>{escape(margin['method'])} over {escape(margin['against'])}{best}</td>"
                f"<td>{target:g}x</td><td>{margin['psnr_mean']:+.1f} dB</td>"
                f"<td>{margin['psnr_low']:+.1f} to {margin['psnr_high']:+.1f}</td>"
                f"<td>{margin['psnr_worst']:+.1f} dB</td><td>{margin['ssim_mean']:+.4f}</td></tr>"
            )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _settings(result: ScenarioResult) -> str:
    head = "".join(
        f"<th>{text}</th>"
        for text in ("method", "setting", "speedup", "predicted", "compute", "PSNR mean", "worst")
    )
    body = []
    for name, curve in result.curves.items():
        for point in sorted(curve.points, key=lambda point: point.speedup):
            promised = point.predicted_speedup
            predicted = "-" if promised is None else f"{promised:.2f}x"
            kind = ' class="ours"' if name == OURS else ""
            body.append(
                f"<tr{kind}><td>{escape(name)}</td><td>{escape(point.label)}</td>"
                f"<td>{point.speedup:.2f}x</td><td>{predicted}</td>"
                f"<td>{100 * point.compute_share:.1f} %</td><td>{point.psnr_mean:.1f} dB</td>"
                f"<td>{float(point.values['psnr'].min()):.1f} dB</td></tr>"
            )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
