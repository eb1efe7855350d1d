"""The code that `docs/hosts/serving.md` shows, run as it stands there."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from layercache import PlanSet
from layercache.models.stepping import sigmas_of
from layercache.plan import Plan
from layercache.runtime import LayerCacheScheduler
from tests.runtime.harness import make_plan, step
from tests.runtime.pipelines import build
from tests.tiny import tiny_arguments, tiny_pipeline

PAGE = Path(__file__).parents[2] / "docs" / "hosts" / "serving.md"
PLANS = {(6, 32): "##0#00", (8, 32): "###00#00", (6, 16): "##0000"}


def generate(pipe: Any, steps: int, size: int, seed: int) -> Tensor:
    arguments = tiny_arguments(seed=seed) | {"output_type": "pt", "height": size, "width": size}
    result: Tensor = pipe("a large red circle", num_inference_steps=steps, **arguments).images
    return result


def plan_of(steps: int, size: int) -> Plan:
    pipe = tiny_pipeline()
    generate(pipe, steps, size, seed=0)
    units = [step(PLANS[steps, size], None)]
    plan = make_plan(pipe, steps, units, sigmas=sigmas_of(pipe.scheduler))
    # As calibration writes it; plan sets tell sizes by the latents.
    tokens = (size // 4) ** 2
    setting = plan.setting | {"height": size, "width": size, "latent_shape": [tokens, 48]}
    predicted = plan.predicted.model_copy(update={"speedup": 2.0})
    return plan.model_copy(update={"setting": setting, "predicted": predicted})


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the tested snippet defines, with a plan set in the working folder."""
    plans = [plan_of(*key) for key in PLANS]
    PlanSet(plans=tuple(plans)).save(tmp_path / "layercache_plans.json")
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    found = re.search(r"<!-- tested: .*?-->\n```python\n(.*?)```", text, re.S)
    assert found is not None
    names: dict[str, Any] = {}
    exec(found[1], names)
    return names


def alone(steps: int, size: int, seed: int) -> Tensor:
    """A request on a pipeline of its own."""
    pipe = tiny_pipeline()
    if (steps, size) in PLANS:
        pipe.scheduler = LayerCacheScheduler.from_plan(plan_of(steps, size), pipe.scheduler)
    return generate(pipe, steps, size, seed)


def test_every_request_gets_its_plan_also_in_threads(page: dict[str, Any]) -> None:
    pipe = tiny_pipeline()

    def served(asked: tuple[int, int, int]) -> Tensor:
        steps, size, seed = asked
        arguments = tiny_arguments(seed=seed) | {"output_type": "pt"}
        sizes = {"height": size, "width": size}
        result: Tensor = page["serve"](pipe, "a large red circle", steps=steps, **arguments | sizes)
        return result

    # The last has no plan.
    asked = [(*key, seed) for seed, key in enumerate([*PLANS, (7, 32)])]
    expected = [alone(*each) for each in asked]
    assert not torch.equal(generate(tiny_pipeline(), *asked[0]), expected[0])
    assert torch.equal(generate(tiny_pipeline(), *asked[-1]), expected[-1])
    with ThreadPoolExecutor(4) as threads:
        for results in (map(served, asked), threads.map(served, asked * 3)):
            for found, wanted in zip(results, expected * 3, strict=False):
                assert torch.equal(found, wanted)


def test_a_saved_pipeline_carries_its_plan(tmp_path: Path) -> None:
    pipe, _ = build("WanPipeline")
    plan = make_plan(pipe, 5, [step("##0#0", [(), (0.3,), (), (0.2, -0.1), ()])])
    pipe.scheduler = LayerCacheScheduler.from_plan(plan, pipe.scheduler)
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path, vae=None, text_encoder=None, tokenizer=None)
    assert isinstance(again.scheduler, LayerCacheScheduler)
    assert again.scheduler.plan == plan
