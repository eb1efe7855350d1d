"""Examples run, at tiny size, and show what they say."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest

from layercache import PlanSet

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL = EXAMPLES.parent / "bench" / "models" / "pictures"


def test_a_plan_for_trajectories(capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(EXAMPLES / "trajectories.py"))["main"]
    found = main(["--steps", "16", "--calls", "8", "--train-steps", "200", "--paths", "4"])
    ((plan, fewer),) = found.values()
    assert list(found) == [8]
    assert plan < fewer / 3
    assert "plan, 8 of 16 steps" in capsys.readouterr().out


@pytest.mark.skipif(
    not (MODEL / "model_index.json").exists(),
    reason="the source archive has no weights of this model",
)
def test_plans_are_published_and_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(MODEL, tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a large red apple\n\na small dog\n")
    call = '{"height": 64, "width": 64, "max_sequence_length": 20}'
    publish = runpy.run_path(str(EXAMPLES / "publish.py"))["main"]
    plans = publish(["model", "prompts.txt", "--steps", "6", "--call", call, "--device", "cpu"])
    assert PlanSet.from_pretrained(model) == plans and len(plans.plans) == 3
    assert plans.plans[0].setting["call"]["height"] == 64
    serve = runpy.run_path(str(EXAMPLES / "serve_qualities.py"))["main"]
    images = serve(["model", "model/layercache_plans.json", "--device", "cpu"])
    assert {path.stem for path in tmp_path.glob("*.png")} == set(images) == {"full", "fine", "fast"}
    # Each quality is a plan of its own, and the last of them was taken off again.
    assert len({image.tobytes() for image in images.values()}) == 3
    assert "warning" not in capsys.readouterr().out
