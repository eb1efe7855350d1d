"""The ComfyUI node, driven through a small stand-in for what it uses of ComfyUI.

The same was tried against ComfyUI itself; `integrations/comfyui/README.md` says what.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from layercache import CalibrationStats, compile_plan
from layercache.calibration import calibrate_function
from layercache.errors import ModelMismatchError, PlanError, UnsupportedModelError
from layercache.plan import Plan
from layercache.runtime import sample
from tests.runtime.harness import group, make_plan, step
from tests.runtime.mixed import LIST, pipeline
from tests.runtime.test_executor import published_taps

PACK = Path(__file__).parents[2] / "integrations" / "comfyui"
CELLS = "##0#00#0"
TAPS = [(), (0.5,), (), (0.25, -0.5), (), (), (0.5, 0.125), ()]


class KSampler:
    """As `comfy.samplers.KSAMPLER`: holds a function, and scales the noise for it."""

    def __init__(self, sampler_function: Any) -> None:
        self.sampler_function = sampler_function

    def sample(self, denoiser: Denoiser, sigmas: Tensor, noise: Tensor, callback: Any) -> Tensor:
        start = sigmas[0] * noise
        extra = {"seed": 7}
        result: Tensor = self.sampler_function(
            denoiser, start, sigmas, extra_args=extra, callback=callback, disable=True
        )
        return result


class Flow:
    """As `comfy.model_sampling.CONST`."""


class Denoiser:
    """What samplers call: inpainting, around guidance, around a model with its `model_sampling`."""

    def __init__(self, velocity: Any, sampling: Any) -> None:
        self.velocity = velocity
        model = types.SimpleNamespace(model_sampling=sampling)
        self.inner_model = types.SimpleNamespace(inner_model=model)
        self.seen: list[float] = []

    def __call__(self, x: Tensor, sigma: Tensor, seed: int) -> Tensor:
        assert sigma.shape == (len(x),) and sigma.dtype == x.dtype and seed == 7
        self.seen.append(float(sigma[0]))
        level = sigma.reshape(-1, *[1] * (x.ndim - 1))
        denoised: Tensor = x - level * self.velocity(x, level)
        return denoised


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "models" / "layercache"
    folder.mkdir(parents=True)
    known: dict[str, str] = {}

    def add(name: str, path: str) -> None:
        known[name] = path

    paths: Any = types.ModuleType("folder_paths")
    paths.models_dir = str(tmp_path / "models")
    paths.add_model_folder_path = add
    paths.get_filename_list = lambda name: sorted(os.listdir(known[name]))
    paths.get_full_path_or_raise = lambda name, file: os.path.join(known[name], file)
    comfy, samplers, sampling = map(
        types.ModuleType, ("comfy", "comfy.samplers", "comfy.model_sampling")
    )
    samplers.KSAMPLER = KSampler  # type: ignore[attr-defined]
    sampling.CONST = Flow  # type: ignore[attr-defined]
    comfy.samplers, comfy.model_sampling = samplers, sampling  # type: ignore[attr-defined]
    for module in (paths, comfy, samplers, sampling):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return folder


@pytest.fixture
def nodes(models: Path) -> Iterator[dict[str, Any]]:
    """Loaded as ComfyUI loads the folders of `custom_nodes`."""
    name = "custom_nodes_layercache"
    spec = importlib.util.spec_from_file_location(name, PACK / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        yield module.NODE_CLASS_MAPPINGS
    finally:
        for found in [key for key in sys.modules if key.split(".")[0] == name]:
            del sys.modules[found]


@pytest.fixture
def node(nodes: dict[str, Any]) -> Any:
    return nodes["LayerCachePlan"]


def saved(folder: Path, cells: str = CELLS, taps: Any = TAPS, **setting: Any) -> Plan:
    plan = make_plan(pipeline(), len(cells), [step(cells, taps)])
    if setting:
        plan = plan.model_copy(update={"setting": setting})
    plan.save(folder / "plan.json")
    return plan


def wave(x: Tensor, sigma: Any) -> Tensor:
    return torch.sin(3 * x) + sigma * x.flip(-1)


def test_it_makes_what_a_loop_of_ones_own_makes(node: Any, models: Path) -> None:
    plan = saved(models)
    assert node.INPUT_TYPES() == {"required": {"plan": (["plan.json"],)}}
    sampler, sigmas = node().load("plan.json")
    noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    told: list[dict[str, Any]] = []
    denoiser = Denoiser(wave, Flow())
    found = sampler.sample(denoiser, sigmas, noise, told.append)
    expected = sample(lambda z, sigma, _: wave(z, sigma), sigmas[0] * noise, plan)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    visited = [plan.sigmas[t] for t, symbol in enumerate(CELLS) if symbol == "#"]
    np.testing.assert_allclose(sigmas, [*visited, 0], rtol=1e-6)
    np.testing.assert_allclose(denoiser.seen, visited, rtol=1e-6)
    assert [each["i"] for each in told] == [0, 1, 2, 3]
    np.testing.assert_allclose([each["sigma"] for each in told], visited, rtol=1e-6)
    assert set(told[0]) == {"x", "i", "sigma", "sigma_hat", "denoised"}
    # Without an observer, and again with the same sampler.
    assert torch.equal(sampler.sample(denoiser, sigmas, noise, None), found)


@pytest.mark.parametrize("cells", ["##0000", "##0#00", "###0#0", "######"])
def test_a_linear_series_is_extrapolated_exactly(cells: str, node: Any, models: Path) -> None:
    """Of v = a + b sigma: the latent ends where the sum over all steps leaves it."""
    pipe = pipeline()
    pipe.scheduler.set_timesteps(len(cells))
    levels = [float(sigma) for sigma in pipe.scheduler.sigmas]
    saved(models, cells, published_taps(cells, levels))
    offset, slope = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[3.0, 0.25, -1.0]])
    sampler, sigmas = node().load("plan.json")
    start = torch.tensor([[0.3, 0.1, -0.7]])
    denoiser = Denoiser(lambda x, sigma: offset + sigma * slope, Flow())
    found = sampler.sample(denoiser, sigmas, start / sigmas[0], None)
    moves = [(b - a) * (offset + slope * a) for a, b in itertools.pairwise(levels)]
    torch.testing.assert_close(found, start + sum(moves), rtol=1e-5, atol=1e-5)
    assert len(denoiser.seen) == cells.count("#")


@pytest.mark.parametrize("wrong", [slice(1, None), slice(None, -1), slice(None, None, 2)])
def test_other_noise_levels_are_refused(wrong: slice, node: Any, models: Path) -> None:
    saved(models)
    sampler, sigmas = node().load("plan.json")
    with pytest.raises(ModelMismatchError, match="connect the SIGMAS"):
        sampler.sample(Denoiser(wave, Flow()), sigmas[wrong], torch.zeros(1, 3), None)
    with pytest.raises(ModelMismatchError, match=r"0\.99"):
        sampler.sample(Denoiser(wave, Flow()), sigmas * 0.99, torch.zeros(1, 3), None)


def test_models_that_are_no_flow_matching_are_refused(node: Any, models: Path) -> None:
    saved(models)
    sampler, sigmas = node().load("plan.json")
    with pytest.raises(UnsupportedModelError, match="object"):
        sampler.sample(Denoiser(wave, object()), sigmas, torch.zeros(1, 3), None)


def test_plans_that_cache_groups_are_refused(node: Any, models: Path) -> None:
    make_plan(pipeline(), 3, [group(LIST, 0, 2, "#0#")]).save(models / "plan.json")
    with pytest.raises(PlanError, match="caches groups"):
        node().load("plan.json")


def test_what_the_prediction_does_not_hold_for_is_told(
    node: Any, models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(models, scheduler="UniPCMultistepScheduler", latent_shape=[2, 2])
    sampler, sigmas = node().load("plan.json")
    assert "UniPC" in caplog.text
    caplog.clear()
    sampler.sample(Denoiser(wave, Flow()), sigmas, torch.zeros(1, 4), None)
    assert caplog.text == ""
    sampler.sample(Denoiser(wave, Flow()), sigmas, torch.zeros(1, 5), None)
    assert "4 values" in caplog.text and "have 5" in caplog.text


def test_a_file_written_anew_is_read_anew(node: Any, models: Path) -> None:
    saved(models)
    before = node.IS_CHANGED("plan.json")
    assert before == node.IS_CHANGED("plan.json")
    saved(models, "#0000000", None)
    assert node.IS_CHANGED("plan.json") != before
    assert len(node().load("plan.json")[1]) == 2


def test_it_calibrates_while_it_samples(nodes: dict[str, Any], models: Path) -> None:
    """Two generations make the statistics of two; a plan of them is a plan for the node."""
    levels = [1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0]
    (sampler,) = nodes["LayerCacheCalibrate"]().make("mine")
    noises = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    for noise in [*noises, noises[0]]:
        told: list[dict[str, Any]] = []
        found = sampler.sample(Denoiser(wave, Flow()), torch.tensor(levels), noise, told.append)
        expected = noise
        for here, there in itertools.pairwise(levels):
            expected = expected + (there - here) * wave(expected, here)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert [each["i"] for each in told] == list(range(6))
    stats = CalibrationStats.load(models / "mine.npz")
    alone = calibrate_function(lambda z, sigma, _: wave(z, sigma), levels, noises)
    assert stats.num_prompts == 2 and stats.model["class_name"] == "ComfyUI SimpleNamespace"
    starts = [set(np.round(s.latents[:, 0].ravel().tolist(), 4)) for s in (stats, alone)]
    assert starts[0] == starts[1]
    rows = [np.sort(s.amplification, axis=0) for s in (stats, alone)]
    np.testing.assert_allclose(*rows, rtol=1e-3)
    compile_plan(stats, 0.5).save(models / "plan.json")
    assert len(nodes["LayerCachePlan"]().load("plan.json")[1]) == 4


def test_what_cannot_be_calibrated_is_refused(nodes: dict[str, Any]) -> None:
    for name in ("", "../mine", ".hidden"):
        with pytest.raises(ValueError, match="name is"):
            nodes["LayerCacheCalibrate"]().make(name)
    (sampler,) = nodes["LayerCacheCalibrate"]().make("mine")
    sigmas = torch.tensor([1.0, 0.5, 0.0])
    with pytest.raises(UnsupportedModelError):
        sampler.sample(Denoiser(wave, object()), sigmas, torch.zeros(1, 3), None)
    with pytest.raises(ValueError, match="2 latents"):
        sampler.sample(Denoiser(wave, Flow()), sigmas, torch.zeros(2, 3), None)


def test_the_workflow_uses_the_node_as_it_is(node: Any) -> None:
    workflow = json.loads((PACK / "example_workflow.json").read_text())
    (number,) = (n for n, each in workflow.items() if each["class_type"] == "LayerCachePlan")
    assert workflow[number]["inputs"].keys() == {"plan"}
    (sampler,) = (each for each in workflow.values() if each["class_type"] == "SamplerCustom")
    for index, kind in enumerate(node.RETURN_TYPES):
        assert sampler["inputs"][kind.lower()] == [number, index]
    links = [i for each in workflow.values() for i in each["inputs"].values() if type(i) is list]
    assert all(source in workflow for source, _ in links)
