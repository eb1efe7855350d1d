"""Other people's caches on a tiny pipeline: what they skip, and that they leave no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.comparison.work import PeakMemory, counted_work
from bench.peers import cachedit
from bench.peers.cachedit import CacheDit, cache_dit_version, preset_masks
from bench.peers.diffusers_caches import (
    first_block_cache,
    mag_cache,
    mag_ratios,
    taylor_seer,
)
from bench.peers.seacache import SeaCache, packed_latents
from layercache.errors import LayerCacheError
from layercache.evaluation._latency import run_once
from layercache.evaluation.methods import Method, Uncached
from layercache.evaluation.peers import Uniform
from tests.evaluation.test_peers import STEPS, work
from tests.tiny import tiny_pipeline

needs_cache_dit = pytest.mark.skipif(cache_dit_version() is None, reason="cache-dit not installed")


class Setup:
    """A pipeline, a batch, and the uncached images and work."""

    def __init__(self) -> None:
        self.pipe = tiny_pipeline()
        (self.batch,) = work()
        self.plain, self.full = self.run(Uncached())

    def run(self, method: Method) -> tuple[Tensor, int]:
        with counted_work(self.pipe.transformer) as done:
            images = run_once(self.pipe, method, self.batch).images
        return images, done.multiply_adds

    def share(self, method: Method) -> float:
        return self.run(method)[1] / self.full


@pytest.fixture(scope="module")
def setup() -> Setup:
    return Setup()


SKIPPING: dict[str, Callable[[], Any]] = {
    "first block": lambda: first_block_cache(10.0),
    "magcache": lambda: mag_cache([1.0] * STEPS, 1.0, 2, 0.2),
    "taylorseer lite": lambda: taylor_seer("lite", 2, 1, warm_up=1),
    "taylorseer blocks": lambda: taylor_seer("blocks", 2, 2, warm_up=1),
    "seacache": lambda: SeaCache(10.0, order=0, max_cached=0),
}


@pytest.mark.parametrize("name", SKIPPING)
def test_a_loose_setting_skips_work_and_leaves_the_pipeline_as_it_was(
    setup: Setup, name: str
) -> None:
    images, done = setup.run(SKIPPING[name]())
    assert done < 0.8 * setup.full
    assert torch.isfinite(images).all() and not torch.equal(images, setup.plain)
    again, full = setup.run(Uncached())
    assert torch.equal(again, setup.plain) and full == setup.full
    assert not setup.pipe.transformer.is_cache_enabled


STRICT: dict[str, Callable[[], Any]] = {
    "first block": lambda: first_block_cache(-1.0),
    "magcache": lambda: mag_cache([1.1] * STEPS, 0.0, 2, 0.2),
    "taylorseer": lambda: taylor_seer("blocks", 2, 1, warm_up=STEPS),
    "seacache": lambda: SeaCache(0.0),
}


@pytest.mark.parametrize("name", STRICT)
def test_a_setting_that_allows_nothing_is_the_uncached_run(setup: Setup, name: str) -> None:
    images, done = setup.run(STRICT[name]())
    assert torch.equal(images, setup.plain) and done == setup.full


def test_two_generations_of_one_method_are_equal(setup: Setup) -> None:
    for make in SKIPPING.values():
        method = make()
        assert torch.equal(setup.run(method)[0], setup.run(method)[0])


def test_magcache_ratios_are_one_a_step(setup: Setup) -> None:
    ratios = mag_ratios(setup.pipe, setup.batch, STEPS)
    assert len(ratios) == STEPS and ratios[0] == 1.0
    assert all(0 < ratio < 10 for ratio in ratios)
    with pytest.raises(LayerCacheError, match="printed 0 curves"):
        mag_ratios(setup.pipe, setup.batch, STEPS + 1)


def test_seacache_sees_latents_as_the_autoencoder_does(setup: Setup) -> None:
    latents = torch.randn(2, 12, 8, 6)
    packed = setup.pipe._pack_latents(latents[:, None], 2, 12, 8, 6)
    unpacked = packed_latents(None, (packed,), {"img_shapes": [[(1, 4, 3)]] * 2})
    assert unpacked is not None
    torch.testing.assert_close(torch.stack(unpacked)[:, :, 0], latents)
    assert packed_latents(None, (packed,), {}) is None


@needs_cache_dit
def test_cache_dit_computes_where_its_mask_says(setup: Setup) -> None:
    mask = (True, False, True, False, False, True)
    method = CacheDit("cache-dit-mask", first_blocks=1, mask=mask)
    images, done = setup.run(method)
    skipped = 1 - done / setup.full
    # Three steps of six keep the first of four blocks and what is around the blocks.
    assert 0.3 < skipped < 3 / 6
    assert not torch.equal(images, setup.plain)
    everything = CacheDit("cache-dit-mask", first_blocks=1, mask=(True,) * STEPS)
    assert torch.equal(setup.run(everything)[0], setup.plain)


@needs_cache_dit
@pytest.mark.parametrize("order", [0, 1])
def test_cache_dit_leaves_class_and_instance_as_they_were(setup: Setup, order: int) -> None:
    kind = type(setup.pipe)
    call, before = kind.__call__, set(vars(kind))
    images, done = setup.run(CacheDit("x", 10.0, first_blocks=1, warm_up=2, taylor_order=order))
    assert done < setup.full and torch.isfinite(images).all()
    assert kind.__call__ is call and set(vars(kind)) == before
    again, full = setup.run(Uncached())
    assert torch.equal(again, setup.plain) and full == setup.full


@needs_cache_dit
def test_cache_dit_presets_compute_less_the_faster_they_are() -> None:
    masks = preset_masks(50)
    computed = [sum(masks[name]) for name in ("slow", "medium", "fast", "ultra")]
    assert computed == sorted(computed, reverse=True) and all(len(m) == 50 for m in masks.values())


def test_a_missing_cache_dit_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(cachedit.importlib, "import_module", missing)
    with pytest.raises(LayerCacheError, match=r"cannot be imported.*layercache-flow\[peers\]"):
        cachedit.load_cache_dit()


def test_counted_work_of_whole_steps_is_their_share(setup: Setup) -> None:
    assert setup.share(Uniform((True, False, True, False, True, False))) == pytest.approx(0.5)
    assert setup.run(Uncached())[1] == setup.full > 0


def test_peak_memory_sees_a_large_tensor() -> None:
    memory = PeakMemory()
    memory.start()
    small = memory.stop()
    if small is None:
        pytest.skip("this system does not tell")
    memory.start()
    torch.ones(64 * 2**20)
    large = memory.stop()
    assert large is not None and large > small + 200 * 2**20
