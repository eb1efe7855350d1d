"""The plans that are shipped."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from diffusers import QwenImageTransformer2DModel

from layercache import Plan
from layercache.models import model_fingerprint

PLANS = Path(__file__).parent.parent / "plans"
PUBLISHED = sorted((PLANS / "published").glob("*.json"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_published_plans_are_what_the_script_makes(path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_published", PLANS / "make_published.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    count = int(path.stem.split("-")[-3])
    plan = Plan.load(path)
    made = module.published_plan(count)
    # Between processors the last digit of a noise level may differ.
    assert plan.sigmas == pytest.approx(made.sigmas, abs=1e-6)
    assert plan == made.model_copy(update={"sigmas": plan.sigmas})
    assert sum(plan.run_steps) == count
    assert plan.predicted.psnr_db is None and plan.provenance["calibrated"] is False


def test_published_plans_are_for_the_class_with_its_defaults() -> None:
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel()
    for path in PUBLISHED:
        assert Plan.load(path).check(model_fingerprint(transformer)) == []


REFERENCE = sorted((PLANS / "reference").glob("*.json"))


@pytest.mark.parametrize("path", REFERENCE, ids=lambda p: p.stem)
def test_the_reference_model_has_plans_with_measured_quality(path: Path) -> None:
    from layercache.reference import load_pipeline

    plan = Plan.load(path)
    assert plan.check(model_fingerprint(load_pipeline().transformer)) == []
    assert plan.measured is not None and not plan.measured.calibration_prompts
    assert plan.budget.text == path.stem
    row = next(
        line
        for line in (PLANS / "README.md").read_text(encoding="utf-8").splitlines()
        if f"(reference/{path.name})" in line
    )
    for figure in (plan.predicted.psnr_median_db, plan.measured.psnr_median_db):
        assert f"{figure:.1f}" in row


def test_the_script_of_the_reference_plans_runs(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_reference", PLANS / "make_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = ("--steps", "4", "--calibration", "1", "--held-out", "1", "--budget", "0.8")
    result = CliRunner().invoke(module.main, ["--out", str(tmp_path), *small])
    assert result.exit_code == 0, result.output
    assert Plan.load(tmp_path / "0.8.json").measured is not None
