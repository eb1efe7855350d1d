"""Prompts as they come: identities that hold everywhere, and requests that make no sense."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from layercache.calibration.prompts import batches, identities_of, noise_seed, prompt_id
from layercache.calibration.sharding import take_shard
from layercache.errors import ModelMismatchError, StatsError
from tests.calibration.test_calibrate import PROMPTS, measure
from tests.tiny import tiny_arguments, tiny_pipeline


def test_arrays_and_images_are_known_by_what_they_hold() -> None:
    long = np.arange(5000.0)
    other = long.copy()
    other[2500] = -1
    assert prompt_id({"image": long}, 0) == prompt_id({"image": long.copy()}, 0)
    assert prompt_id({"image": long}, 0) != prompt_id({"image": other}, 0)
    red, blue = (Image.new("RGB", (2, 2), colour) for colour in ("red", "blue"))
    assert prompt_id({"image": red}, 0) == prompt_id({"image": red.copy()}, 0)
    assert prompt_id({"image": red}, 0) != prompt_id({"image": blue}, 0)


def test_a_repeated_prompt_has_noise_of_its_own_and_its_first_identity_stays() -> None:
    found = identities_of(["", "a", "", {"prompt": ""}, ""], seed=0)
    assert len(set(found)) == 5
    assert found[0] == prompt_id("", 0) and found[4] == prompt_id("", 0, repetition=2)
    assert len({noise_seed(identity) for identity in found}) == 5
    # Which prompts stand between or behind repetitions is nothing to them.
    assert identities_of([""] * 3, seed=0) == (found[0], found[2], found[4])


@pytest.mark.parametrize("prompt", ["", {"height": 32}])
def test_repetitions_are_the_same_however_they_are_split(prompt: Any) -> None:
    prompts = [prompt] * 5
    expected = set(identities_of(prompts, 3))
    for size in (1, 2, 5):
        assert {i for b in batches(prompts, 3, size, {}) for i in b.ids} == expected
    parts = [take_shard(batches(prompts, 3, 2, {}), (index, 2)) for index in range(2)]
    assert {i for part in parts for batch in part for i in batch.ids} == expected


def test_text_that_is_no_unicode_has_an_identity() -> None:
    assert prompt_id({"prompt": "\ud800"}, 0) != prompt_id({"\ud800": "prompt"}, 0)


def test_prompts_equal_but_for_their_noise_are_measured_and_resumed(tmp_path: Any) -> None:
    common = {"mode": "residual", "probes": 0, "parts": tmp_path}
    once = measure(tiny_pipeline(), PROMPTS[:1], **common)
    again = measure(tiny_pipeline(), PROMPTS[:1] * 3, **common)
    assert again.num_prompts == 3 and set(once.prompt_ids) < set(again.prompt_ids)
    assert len(list(tmp_path.glob("*.npz"))) == 3
    assert len({float(abs(row).sum()) for row in again.velocities}) == 3


@pytest.mark.parametrize("value", [object(), torch.Generator(), np.array([object()])])
def test_values_without_an_identity_are_refused(value: Any) -> None:
    with pytest.raises(StatsError, match="another process would not recognise"):
        prompt_id({"prompt": "a circle", "extra": value}, 0)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("a circle", "non-empty sequence"),
        ({"prompt": "a circle"}, "non-empty sequence"),
        (iter(["a circle"]), "non-empty sequence"),
        (["a circle", None], "prompt 1 is None; give a string or a mapping"),
        ([7], "prompt 0 is 7"),
        ([{"prompt": "a", "num_inference_steps": 3}], "num_inference_steps=3 in a run of 4 steps"),
    ],
)
def test_what_is_no_list_of_prompts_is_refused(prompts: Any, message: str) -> None:
    with pytest.raises(StatsError, match=message):
        batches(prompts, 0, 1, {"num_inference_steps": 4})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"call_kwargs": tiny_arguments(num_images_per_prompt=2)}, "2 images for 1 prompts"),
        ({"call_kwargs": tiny_arguments(num_inference_steps=9)}, "call_kwargs asks for 9 steps"),
        ({"num_inference_steps": 5.0}, "num_inference_steps=5.0: it must be a whole number"),
        ({"batch_size": "2"}, "batch_size='2': it must be a whole number"),
        ({"seed": 2**70}, "seed=1180591620717411303424: it must have at most 62 bits"),
        ({"groups": 2.0}, "groups is 2.0; give a number"),
        ({"groups": ["0:4"]}, r"groups is \['0:4'\]; give a number"),
    ],
)
def test_requests_that_would_be_measured_wrongly_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(StatsError, match=message):
        measure(tiny_pipeline(), PROMPTS[:1], **changes)


def test_statistics_of_another_negative_prompt_do_not_merge() -> None:
    one = measure(tiny_pipeline(), PROMPTS[:1], mode="residual")
    call = tiny_arguments(negative_prompt="a gray background")
    other = measure(tiny_pipeline(), PROMPTS[1:], mode="residual", call_kwargs=call)
    with pytest.raises(ModelMismatchError, match=r"call\.negative_prompt differs"):
        one.merge(other)


def test_callbacks_and_spelled_out_defaults_are_no_difference() -> None:
    one = measure(tiny_pipeline(), PROMPTS[:1], mode="residual")
    call = tiny_arguments(callback_on_step_end=lambda pipe, step, time, kept: kept)
    other = measure(tiny_pipeline(), PROMPTS[1:], mode="residual", call_kwargs=call)
    assert one.merge(other).num_prompts == 2


def test_integers_of_numpy_are_integers(tmp_path: Any) -> None:
    stats = measure(
        tiny_pipeline(), PROMPTS[:1], mode="residual", seed=np.int64(1), groups=np.int64(2),
        num_inference_steps=np.int64(5),
    )  # fmt: skip
    stats.save(tmp_path / "stats.npz")
    assert stats.setting["num_inference_steps"] == 5


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("mode", ["replay", "residual"])
@pytest.mark.parametrize("groups", [1, "auto:1"])
def test_a_step_or_two_and_one_block_are_enough(steps: int, mode: str, groups: Any) -> None:
    stats = measure(tiny_pipeline(blocks=1), num_inference_steps=steps, mode=mode, groups=groups)
    assert stats.deltas.shape[:4] == (2, steps, 1, 3)
    assert "a step:" in stats.summary() and "nan" not in stats.summary()
