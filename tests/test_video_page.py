"""The page on video runs from its first line to its last, on tiny Wan pipelines in folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from layercache import ModelMismatchError, compile_plan
from layercache.calibration import calibrate
from layercache.runtime import check_run
from tests.pipelines.entry import assemble, transformer, unipc
from tests.pipelines.registry import BY_NAME
from tests.pipelines.vaes import wan_vae
from tests.test_snippets import PROMPTS, run_page

SMALL = {
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "one",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "two",
    "480": "32",
    "832": "32",
    "81": "5",
    "--steps 50": "--steps 6",
    "--steps 40": "--steps 8",
    "--budget 2x": "--budget 50%",  # a speedup hangs on timings, which are noise at this size
    "=50": "=6",
    "=40": "=8",
    '.to("cuda")': "",
    "torch.bfloat16": "torch.float32",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Wan with one expert and with two, with a text encoder, and prompts."""
    monkeypatch.chdir(tmp_path)
    words = {
        word: index for index, word in enumerate(["<pad>", "<unk>", "</s>", "a", "large", "red"])
    }
    tokens = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    text = {
        "tokenizer": PreTrainedTokenizerFast(
            tokenizer_object=tokens, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
        ),
        "text_encoder": UMT5EncoderModel(
            UMT5Config(vocab_size=8, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ).eval(),
    }
    for name, second in (
        ("one", {}),
        (
            "two",
            {"transformer_2": transformer("WanTransformer3DModel", seed=1), "boundary_ratio": 0.7},
        ),
    ):
        pipe = assemble(
            "WanPipeline", scheduler=unipc(), vae=wan_vae(), **text, **second,
            transformer=transformer("WanTransformer3DModel"),
        )  # fmt: skip
        pipe.save_pretrained(name)
    for name in ("prompts.txt", "others.txt"):
        Path(name).write_text("\n".join(PROMPTS))
    return tmp_path


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    diffusers.utils.logging.disable_progress_bar()
    yield
    diffusers.utils.logging.enable_progress_bar()


def test_the_page_runs_from_its_first_line_to_its_last(folder: Path) -> None:
    names = {"image": Image.new("RGB", (32, 32))}
    run_page("docs/video.md", names, SMALL, folder)
    assert torch.as_tensor(names["frames"]).shape == (5, 32, 32, 3)
    assert {plan.component for plan in names["plans"].plans} == {"transformer", "transformer_2"}
    assert (folder / "report" / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "frames", "runs"),
    [
        ("WanPipeline: text-to-video", 9, True),
        ("HunyuanVideoPipeline: text-to-video", 9, True),
        ("LTXPipeline: text-to-video", 17, False),
    ],
)
def test_another_number_of_frames(name: str, frames: int, runs: bool) -> None:
    entry = BY_NAME[name]
    pipe = entry.build()
    stats = calibrate(
        pipe, [entry.prompt(1)], num_inference_steps=entry.steps, groups=0, probes=0,
        call_kwargs=entry.call(), progress=False,
    )  # fmt: skip
    plan = compile_plan(stats, 0.7)
    arguments = {**entry.prompt(1), **entry.call(), "num_inference_steps": entry.steps}
    assert check_run(pipe, plan, arguments) == []
    arguments["num_frames"] = frames
    if runs:
        assert any("num_frames" in warning for warning in check_run(pipe, plan, arguments))
    else:
        with pytest.raises(ModelMismatchError):
            check_run(pipe, plan, arguments)
