"""`layercache export`: the files load where they are meant to, and do there what they say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import UniPCMultistepScheduler

from bench.peers.cachedit import load_cache_dit
from layercache.plan import Plan
from layercache.runtime import LayerCacheScheduler
from tests.runtime.harness import group, make_plan, step
from tests.runtime.mixed import LIST, pipeline
from tests.runtime.pipelines import build as build_pipeline
from tests.test_cli import failed, run, succeeded
from tests.tiny import tiny_arguments, tiny_pipeline

needs_cache_dit = pytest.mark.skipif(
    importlib.util.find_spec("cache_dit") is None, reason="cache-dit not installed"
)
CELLS = "##0#00#0"
TAPS = [(), (0.5,), (), (0.25, -0.5), (), (), (0.5,), ()]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    plan = make_plan(pipeline(), len(CELLS), [step(CELLS, TAPS)])
    plan.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_a_scheduler_that_is_written_is_the_plan(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "scheduler"
    result = succeeded("export", saved, "--scheduler", out)
    assert result.stdout == f"wrote {out}\n" and result.stderr == ""
    assert LayerCacheScheduler.from_pretrained(out).plan == Plan.load(saved)


def test_the_scheduler_of_a_pipeline_is_what_it_stands_for(tmp_path: Path) -> None:
    """Of a UniPC pipeline a plan cannot be run without."""
    pipe, _ = build_pipeline("WanPipeline")
    pipe.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe.save_pretrained(tmp_path / "pipe")
    plan = make_plan(pipe, len(CELLS), [step(CELLS, TAPS)])
    plan = plan.model_copy(update={"setting": {"scheduler": "UniPCMultistepScheduler"}})
    plan.save(tmp_path / "plan.json")
    arguments = ("export", tmp_path / "plan.json", "--scheduler", tmp_path / "scheduler")
    message = failed(1, *arguments)
    assert "UniPC" in message and "MODEL" in message
    succeeded(*arguments, tmp_path / "pipe")
    found = LayerCacheScheduler.from_pretrained(tmp_path / "scheduler")
    assert type(found.base) is UniPCMultistepScheduler
    assert "cannot load the scheduler" in failed(1, *arguments, tmp_path / "nothing")


def test_what_cannot_be_written_is_one_line(saved: Path, tmp_path: Path) -> None:
    assert run("export", saved).exit_code == 2
    with_groups = make_plan(pipeline(), 3, [group(LIST, 0, 2, "#0#")])
    with_groups.save(tmp_path / "groups.json")
    out = tmp_path / "out"
    assert "caches groups" in failed(1, "export", tmp_path / "groups.json", "--scheduler", out)
    assert "skips no step" in failed(1, "export", tmp_path / "groups.json", "--cache-dit", out)
    assert "no such plan" in failed(1, "export", tmp_path / "none.json", "--cache-dit", out)
    assert not out.exists()


def test_what_is_lost_is_told(tmp_path: Path) -> None:
    units = [step("##0#", [(), (0.5,), (), ()]), group(LIST, 0, 2, "##.0")]
    make_plan(pipeline(), 4, units).save(tmp_path / "plan.json")
    out = tmp_path / "cache.json"
    result = succeeded("export", tmp_path / "plan.json", "--cache-dit", out, "--json")
    lost = json.loads(result.stdout)["cache_dit"]["lost"]
    assert [text for text in lost if "taps of 1 step" in text or "1 cached cells" in text] == lost[
        2:
    ]
    assert len(lost) == 4
    shown = succeeded("export", tmp_path / "plan.json", "--cache-dit", out)
    assert shown.stderr.count("lost: ") == 4


@needs_cache_dit
@pytest.mark.parametrize("branches", [1, 2])
def test_the_mask_loads_in_cache_dit_and_computes_what_it_says(
    branches: int, saved: Path, tmp_path: Path
) -> None:
    cache_dit, out = load_cache_dit(), tmp_path / "cache.json"
    Plan.load(saved).model_copy(update={"branches": branches}).save(saved)
    succeeded("export", saved, "--cache-dit", out)
    config: Any = cache_dit.load_configs(str(out))["cache_config"]
    assert config.steps_computation_mask == [int(symbol == "#") for symbol in CELLS]
    assert config.steps_computation_policy == "static"
    assert (config.Fn_compute_blocks, config.num_inference_steps) == (1, len(CELLS))

    pipe, computed = tiny_pipeline(), []
    blocks = pipe.transformer.transformer_blocks
    for index in (0, 1):
        blocks[index].register_forward_pre_hook(lambda *_, index=index: computed.append(index))
    arguments = tiny_arguments(num_inference_steps=len(CELLS), negative_prompt="", seed=0)
    if branches == 1:
        arguments["true_cfg_scale"] = 1.0
    cache_dit.enable_cache(pipe, **cache_dit.load_configs(str(out)))
    try:
        pipe("a large red circle", **arguments)
    finally:
        cache_dit.disable_cache(pipe)
    # The first block runs at every step, the others where the plan computes.
    assert computed.count(0) == branches * len(CELLS)
    assert computed.count(1) == branches * CELLS.count("#")


def test_more_calls_a_step_than_cache_dit_counts_are_refused(saved: Path, tmp_path: Path) -> None:
    Plan.load(saved).model_copy(update={"branches": 3}).save(saved)
    assert "3 times a step" in failed(1, "export", saved, "--cache-dit", tmp_path / "cache.json")
