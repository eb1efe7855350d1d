"""The page on which a plan is chosen, as a browser draws it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from layercache import BudgetError, LayerCacheError, Plan
from layercache.choices import frontier
from layercache.evaluation.explore import explore_page
from layercache.paying import paying
from layercache.stats import CalibrationStats
from tests.prediction.oracle import polynomial_stats

SHARES = (0.9, 0.7, 0.5, 0.33)
BROWSER = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)


@pytest.fixture(scope="module")
def stats() -> CalibrationStats:
    return polynomial_stats(6)


@pytest.fixture(scope="module")
def page(stats: CalibrationStats) -> str:
    return explore_page(stats, shares=SHARES)


def data_of(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(found[1].replace("<\\/", "</"))


def evaluation(folder: Path) -> Path:
    folder.mkdir()
    row = {"compute_share": 0.5, "speedup_measured": 1.9, "psnr_median": 44.0, "psnr_worst": 31.0}
    (folder / "results.json").write_text(json.dumps({"rows": [row], "images": 8}))
    Image.new("RGB", (4, 4)).save(folder / "sheet.png")
    return folder


def test_the_page_is_one_file_that_reaches_for_nothing(page: str) -> None:
    class Sources(HTMLParser):
        found: list[str]

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found += [str(v) for k, v in attrs if k in ("src", "href") and v]

    parser = Sources()
    parser.found = []
    parser.feed(page)
    assert parser.found == []
    assert "{{data}}" not in page and "@import" not in page and "fetch(" not in page


def test_the_page_holds_the_plans_that_compiling_gives(stats: CalibrationStats, page: str) -> None:
    plans = [Plan.from_dict(json.loads(entry["file"])) for entry in data_of(page)["plans"]]
    assert plans == frontier(stats, SHARES)
    speeds = [plan.predicted.speedup for plan in plans]
    assert speeds == sorted(speeds) and len(set(speeds)) == len(speeds)


def test_shares_that_cannot_be_met_are_left_out(stats: CalibrationStats) -> None:
    assert frontier(stats, [0.5, 1e-4]) == frontier(stats, [0.5])
    with pytest.raises(BudgetError):
        frontier(stats, [1e-4])


def test_text_of_a_model_cannot_leave_its_place(stats: CalibrationStats) -> None:
    hostile = "</script><img src=x onerror=alert(1)>"
    changed = replace(stats, setting=dict(stats.setting) | {"pipeline": hostile})
    made = explore_page(changed, shares=(0.5,))
    assert hostile not in made and hostile in data_of(made)["facts"]["Made for"]


def test_every_guidance_is_shown(stats: CalibrationStats) -> None:
    """FLUX has both, and the second is off unless it is asked for."""
    setting = {"guidance_scale": 3.5, "true_cfg_scale": 1.0}
    made = explore_page(replace(stats, setting=dict(stats.setting) | setting), shares=(0.5,))
    assert "guidance_scale 3.5, true_cfg_scale 1.0" in data_of(made)["facts"]["Made for"]


@pytest.mark.parametrize("text", [None, "[]", "{", '{"rows": []}', '{"rows": [{}], "images": 1}'])
def test_a_folder_without_an_evaluation_is_refused(
    stats: CalibrationStats, tmp_path: Path, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(LayerCacheError, match="eval --out"):
        explore_page(stats, shares=(0.5,), evaluations=[tmp_path])


# -- in a browser ----------------------------------------------------------------------------------


def drawn(page: str, folder: Path, chosen: int, width: int = 1100) -> str:
    """The document after its script ran; fails if the script complains."""
    if BROWSER is None:
        pytest.skip("no Chromium here")
    file = folder / "explore.html"
    file.write_text(page, encoding="utf-8")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900",
        "--virtual-time-budget=2000", "--dump-dom", f"{file.as_uri()}#{chosen}",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in result.stderr, result.stderr
    return result.stdout


def text_of(document: str, name: str) -> str:
    return re.search(rf'id="{name}"[^>]*>(.*?)<', document, re.S)[1]


def test_a_browser_shows_the_chosen_plan(page: str, tmp_path: Path) -> None:
    plans = data_of(page)["plans"]
    for chosen in (0, len(plans) - 1):
        document = drawn(page, tmp_path, chosen)
        predicted = plans[chosen]["predicted"]
        assert text_of(document, "speed") == f"{predicted['speedup']:.2f}x"
        assert text_of(document, "quality") == f"{predicted['psnr_median_db']:.1f} dB"
        assert text_of(document, "share") == f"{100 * predicted['compute_share']:.0f} %"
        grid = document[document.index('id="grid"') : document.index('id="samples"')]
        cells = sum(len(row["cells"]) for row in plans[chosen]["rows"])
        assert grid.count("<rect") == cells


def test_a_browser_shows_what_was_measured(stats: CalibrationStats, tmp_path: Path) -> None:
    made = explore_page(stats, shares=SHARES, evaluations=[evaluation(tmp_path / "run")])
    document = drawn(made, tmp_path, 1)
    curve = document[document.index('id="curve"') : document.index('id="reading"')]
    assert curve.count("<rect") == 1 and ">run</text>" in curve
    assert "median 44.0 dB, worst 31.0 dB" in text_of(document, "sample-note")


# -- what pays -------------------------------------------------------------------------------------


def test_paying_compares_a_group_with_the_step(stats: CalibrationStats) -> None:
    found = paying(stats)
    assert found.map.shape == (stats.num_steps, stats.num_groups)
    assert found.share.sum() <= 1 + 1e-9
    # Ten times the deltas are a hundred times the squared error; a step costs what it cost.
    louder = paying(replace(stats, deltas=10 * stats.deltas))
    np.testing.assert_allclose(louder.ratio, 100 * found.ratio, rtol=0.05)
    np.testing.assert_allclose(louder.skipped, found.skipped)


def test_the_answer_names_the_groups_that_pay(stats: CalibrationStats) -> None:
    assert stats.groups[0].name in paying(stats).table().splitlines()[-1]
    never = paying(replace(stats, deltas=1e3 * stats.deltas)).table()
    assert "skipping whole steps" in never.splitlines()[-1]
