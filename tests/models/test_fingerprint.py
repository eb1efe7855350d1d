"""What a fingerprint ignores, what it does not, and what a setting holds."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from layercache.models import model_fingerprint, setting_of
from tests.models.zoo import build
from tests.tiny import tiny_pipeline

NAME = "QwenImageTransformer2DModel"


def test_weights_dtype_and_place_do_not_matter(tmp_path: Path) -> None:
    model, _ = build(NAME)
    expected = model_fingerprint(model)
    other, _ = build(NAME, seed=1)
    assert model_fingerprint(other.to(torch.bfloat16)) == expected
    model.save_pretrained(tmp_path / "somewhere")
    assert model_fingerprint(type(model).from_pretrained(tmp_path / "somewhere")) == expected


def test_an_option_at_its_default_does_not_matter() -> None:
    model, _ = build(NAME)
    explicit, _ = build(NAME, zero_cond_t=False)
    assert model_fingerprint(explicit) == model_fingerprint(model)


def test_architecture_matters() -> None:
    model, _ = build(NAME)
    deeper, _ = build(NAME, num_layers=5)
    narrower, _ = build(NAME, joint_attention_dim=12)
    prints = [model_fingerprint(m) for m in (model, deeper, narrower)]
    assert len({p["architecture"] for p in prints}) == 3
    assert prints[1]["block_lists"] == {"transformer_blocks": 5}
    assert prints[0]["class_name"] == NAME


def test_a_setting_is_json_and_leaves_out_what_is_unknown() -> None:
    pipe = tiny_pipeline()
    setting = setting_of(pipe, {"num_inference_steps": 8, "height": 32, "generator": object()})
    assert json.loads(json.dumps(setting)) == setting
    assert setting["num_inference_steps"] == 8
    assert setting["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert setting["scheduler_shift"] == 3.0
    assert setting["dtype"] == "float32"
    assert "generator" not in setting
    assert "width" not in setting
