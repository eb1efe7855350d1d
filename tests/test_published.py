"""The plans that are shipped."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
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
