"""Tables, pictures and the report of a made-up comparison."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from layercache.evaluation._artifacts import write_artifacts
from layercache.evaluation._compare import Comparison, Row
from layercache.evaluation._report import html_report
from layercache.evaluation._sheets import image_sheet
from layercache.evaluation.plots import pareto, plan_heat_map
from layercache.plan import Plan
from tests.test_plan_format import example

METHODS = ("layercache", "layercache-published", "meancache", "uniform", "fewer-steps")
KEYS = {
    "method",
    "target_speedup",
    "compute_share",
    "speedup_measured",
    "speedup_predicted",
    "psnr_mean",
    "psnr_worst",
    "ssim_mean",
}


def comparison(targets: tuple[float, ...] = (1.5, 3.0)) -> Comparison:
    torch.manual_seed(0)
    references = torch.rand(4, 3, 32, 32)
    rows, images = [], {}
    for target in targets:
        for rank, name in enumerate(METHODS):
            psnr = 60 / target - rank
            predicted = None if name == "uniform" else 0.95 * target
            rows.append(
                Row(name, target, 1 / target, 0.9 * target, predicted, psnr, psnr - 9, psnr, 0.99)
            )
            images[name, target] = references + 0.01 * (rank + 1)
    return Comparison(tuple(rows), references, images, 5.5, 2)


PROMPTS = ["a large red circle <on> a gray background", "a star", "a blue ring left", "a cross"]


class Structure(HTMLParser):
    """Records tags, and fails on tags that are closed out of order."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [str(v) for k, v in attrs if k in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_table_has_a_line_for_every_row() -> None:
    lines = [line for line in comparison().table().splitlines() if line.strip()]
    assert len(lines) == 1 + 2 * len(METHODS)
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    assert "layercache-published" in lines[2]


def test_results_hold_the_promised_keys_as_plain_json() -> None:
    data = json.loads(json.dumps(comparison().to_dict(), allow_nan=False))
    assert len(data["rows"]) == 2 * len(METHODS)
    assert all(set(row) >= KEYS for row in data["rows"])
    assert data["rows"][3]["speedup_predicted"] is None


def test_the_report_is_one_well_formed_file_without_scripts_or_links() -> None:
    plan = Plan.from_dict(example())
    pictures = {"pareto": pareto(comparison()), "plan": plan_heat_map({"1.5x": plan})}
    page = html_report(comparison(), {1.5: plan}, pictures, {"Model <x>": "a & b"})
    parsed = Structure()
    parsed.feed(page)
    assert parsed.open == []
    assert "script" not in parsed.tags and "link" not in parsed.tags
    assert len(parsed.sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in parsed.sources)
    assert parsed.tags.count("tr") == 1 + 2 * (1 + len(METHODS))
    assert "Model &lt;x&gt;" in page and "a &amp; b" in page
    assert plan.units[0].cells in page


def test_the_report_names_the_margin_to_meancache() -> None:
    page = html_report(comparison(), {}, {}, {})
    assert re.findall(r"([+-][\d.]+) dB to MeanCache", page) == ["+2.0", "+2.0"]


def test_the_sheet_shows_every_image_pixel_for_pixel() -> None:
    made = comparison((2.0,))
    sheet = np.asarray(Image.open(io.BytesIO(image_sheet(made, PROMPTS, count=2))))
    # The first uncached image, enlarged without interpolation, within its frame.
    expected = (made.references[0] * 255).round().byte().permute(1, 2, 0).numpy()
    times = 192 // expected.shape[0]
    expected = expected.repeat(times, axis=0).repeat(times, axis=1)[1:-1, 1:-1]
    row, column = expected.shape[:2]
    found = any(
        np.array_equal(sheet[top : top + row, 151 : 151 + column], expected)
        for top in range(sheet.shape[0] - row)
    )
    assert found


def test_a_method_without_error_has_a_black_difference() -> None:
    made = comparison((2.0,))
    same = replace(made, images=dict.fromkeys(made.images, made.references))
    assert image_sheet(same, PROMPTS) != image_sheet(made, PROMPTS)


def test_pictures_are_png_of_a_sensible_size() -> None:
    plan = Plan.from_dict(example())
    for png in (pareto(comparison()), plan_heat_map({"a": plan, "b": plan})):
        width, height = Image.open(io.BytesIO(png)).size
        assert 800 < width < 2400 and 200 < height < 2400


def test_artifacts_are_written_and_named(tmp_path: Path) -> None:
    files = write_artifacts(
        tmp_path, comparison(), {1.5: Plan.from_dict(example())}, PROMPTS, {"a": "b"}, title="T"
    )
    names = ["sheet.png", "plan.png", "pareto.png", "report.html", "results.json"]
    assert [file.name for file in files] == names
    assert all(file.stat().st_size > 500 for file in files)
    assert json.loads(files[-1].read_text())["facts"] == {"a": "b"}


def test_results_with_nan_are_refused(tmp_path: Path) -> None:
    made = comparison()
    broken = replace(made, uncached_seconds=math.nan)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_artifacts(tmp_path, broken, {1.5: Plan.from_dict(example())}, PROMPTS, {}, title="T")


def timed(share: float, speedup: float) -> Comparison:
    made = comparison((2.0,))
    ours = replace(made.rows[0], compute_share=share, speedup_measured=speedup)
    return replace(made, rows=(ours, *made.rows[1:]))


@pytest.mark.parametrize(
    ("share", "speedup", "doubted"),
    [
        (0.5, 0.99, True), (0.5, 1.0, False), (0.73, 0.95, False), (0.25, 0.4, True),
        (0.73, 0.21, True), (0.3, 1.2, False),
        (0.5, 2.4, False), (0.5, 2.6, True), (1.0, 1.2, False), (1.0, 1.3, True),
    ],
)  # fmt: skip
def test_a_timing_that_cannot_be_right_is_flagged_and_not_shown(
    share: float, speedup: float, doubted: bool
) -> None:
    made = timed(share, speedup)
    data = made.to_dict()["rows"][0]
    assert data["speedup_measured"] == speedup
    assert (data["timing_doubt"] is not None) == doubted
    assert all(row["timing_doubt"] is None for row in made.to_dict()["rows"][1:])
    line = next(text for text in made.table().splitlines() if " layercache " in text)
    page = html_report(made, {}, {}, {})
    for text in (line, page):
        assert ("unclear" in text) == doubted
        assert f"{100 * share:.1f} %" in text
    cell = f"<td>{speedup:.2f}x</td>"
    assert (cell in page) != doubted
    assert ("layercache at 2x was timed at" in made.table()) == doubted
    pareto(made)


def test_cells_are_bold_only_where_they_lead() -> None:
    made = comparison((2.0,))
    # The rival is better in the mean, equal in SSIM, and worse in its worst image.
    rival = replace(made.rows[1], psnr_mean=99.0, psnr_worst=1.0)
    rows = (made.rows[0], rival, *made.rows[2:])
    page = html_report(replace(made, rows=rows), {}, {}, {})
    found = {
        match[1]: re.findall(r'class="best">([^<]*)<', match[2])
        for match in re.finditer(r"<tr[^>]*><td>([\w-]+)</td>(.*?)</tr>", page)
    }
    worst = f"{made.rows[0].psnr_worst:.1f} dB"
    assert found["layercache"] == [worst, "0.9900"]
    assert found["layercache-published"] == ["99.0 dB", "0.9900"]
    assert found["uniform"] == ["0.9900"]
    assert re.findall(r"tr\.ours[^}]*font-weight", page) == [], "no row is bold as a whole"
