"""Videos and latents in metrics, comparison, sheets and `eval`, on tiny pipelines of diffusers."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bench.comparison.lpips import Lpips
from bench.comparison.metrics import ms_ssim
from layercache.errors import LayerCacheError
from layercache.evaluation._sheets import FRAMES, image_sheet
from layercache.evaluation.evaluate import evaluate_plan
from layercache.evaluation.metrics import (
    fidelity,
    latent_psnr,
    psnr,
    ssim,
)
from layercache.models.pipelines import run_pipeline
from tests.pipelines.entry import Entry
from tests.pipelines.observe import observe
from tests.pipelines.registry import BY_NAME
from tests.runtime.harness import make_plan, step

ODD = (45, 33)


def video(seed: int, frames: int = 4, size: tuple[int, int] = ODD) -> Tensor:
    """(2, F, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, frames, 3, *size, generator=generator)


# -- metrics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [psnr, ssim, ms_ssim], ids=["psnr", "ssim", "ms_ssim"])
def test_a_video_scores_the_mean_of_its_frames(metric: Any) -> None:
    reference = video(0)
    other = (reference + 0.1 * torch.arange(4).reshape(4, 1, 1, 1) * (video(1) - 0.5)).clamp(0, 1)
    values = metric(other, reference)
    assert values.shape == (2,)
    for index in range(2):
        frames = metric(other[index], reference[index])
        assert values[index].item() == pytest.approx(frames.mean().item(), rel=1e-6)


def test_lpips_of_videos_is_the_mean_over_frames() -> None:
    torch.manual_seed(0)
    widths = ((3, 4, 11), (4, 4, 5), (4, 4, 3), (4, 4, 3), (4, 4, 3))
    metric = Lpips(
        kernels=tuple(torch.randn(o, i, k, k) for i, o, k in widths),
        biases=tuple(torch.zeros(o) for _, o, _ in widths),
        channels=tuple(torch.rand(1, o, 1, 1) for _, o, _ in widths),
    )
    a, b = video(0), video(1)
    values = metric(a, b)
    assert values.shape == (2,)
    assert values[0].item() == pytest.approx(metric(a[0], b[0]).mean().item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 16, 8, 4, 4), (1, 1, 1, 3, 4, 4)], ids=str)
def test_what_holds_no_images_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(LayerCacheError, match=re.escape(str(shape))):
        psnr(torch.zeros(shape), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 16, 4), (2, 4, 3, 8, 8)], ids=["packed", "video"])
def test_latents_are_scored_relative_to_their_range(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(*shape, generator=generator)
    span = reference.flatten(1).max(1).values - reference.flatten(1).min(1).values
    moved = reference + 0.01 * span.reshape(2, *[1] * (len(shape) - 1))
    assert latent_psnr(moved, reference).tolist() == pytest.approx([40.0, 40.0], abs=1e-3)
    assert latent_psnr(7 * moved, 7 * reference).tolist() == pytest.approx([40.0, 40.0], abs=1e-3)
    quality = fidelity(moved, reference, decoded=False)
    assert quality.ssim_mean is None and quality.psnr_mean == pytest.approx(40.0, abs=1e-3)


# -- pipelines -------------------------------------------------------------------------------------

WAN = BY_NAME["WanPipeline: text-to-video, decoded"]
LATENTS = BY_NAME["WanPipeline: text-to-video"]
LTX = BY_NAME["LTXPipeline: text-to-video"]
WITH_AUDIO = BY_NAME["LTX2Pipeline: text-to-video with audio"]
PACKED = BY_NAME["FluxPipeline: text-to-image"]
UNBATCHED = BY_NAME["Cosmos3OmniPipeline: text-to-video"]


def call(entry: Entry) -> dict[str, Any]:
    return {**entry.call(), "num_inference_steps": entry.steps}


@pytest.mark.parametrize(
    ("entry", "shape"),
    [
        (WAN, (1, 5, 3, 32, 32)),
        (LATENTS, (1, 4, 2, 4, 4)),
        (WITH_AUDIO, (1, 5, 3, 32, 32)),
        (UNBATCHED, (1, 5, 3, 32, 32)),
        (PACKED, (1, 16, 16)),
    ],
    ids=["video", "latents of a video", "video with audio", "one video, unbatched", "packed"],
)
def test_what_a_pipeline_made(entry: Entry, shape: tuple[int, ...]) -> None:
    with torch.no_grad():
        made = run_pipeline(entry.build(), call(entry) | entry.prompt(1))
    assert made.shape == shape


def evaluated(entry: Entry, out: Path | None = None) -> Any:
    pipe = entry.build()
    seen = observe(entry, pipe)
    sigmas, calls = tuple(pipe.scheduler.sigmas.tolist()), seen.calls // entry.steps
    plan = make_plan(pipe, entry.steps, [step("##0#0#")], sigmas=sigmas, branches=calls)
    prompts = [entry.prompt(1), entry.prompt(2)]
    return evaluate_plan(pipe, plan, prompts, call_kwargs=entry.call(), out=out, progress=False)


@pytest.mark.parametrize("entry", [WAN, LTX], ids=["Wan", "LTX"])
def test_eval_of_videos(entry: Entry, tmp_path: Path) -> None:
    comparison = evaluated(entry, tmp_path)
    frames = comparison.references.shape[1]
    assert comparison.references.shape == (2, frames, 3, 32, 32)
    row = comparison.rows[0]
    found = comparison.images[row.method, row.target_speedup]
    expected = psnr(found.flatten(0, 1), comparison.references.flatten(0, 1)).mean()
    assert row.psnr_mean == pytest.approx(expected.item(), rel=1e-9)
    assert 10 < row.psnr_mean < 120 and 0 < row.ssim_mean <= 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["decoded"] and results["facts"]["Videos"].startswith("2,")
    sheet = Image.open(tmp_path / "sheet.png")
    strips = 1 + len(comparison.rows)
    assert sheet.width > strips * FRAMES * 128
    assert "Image sheet" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("entry", [LATENTS, PACKED], ids=["video", "packed"])
def test_eval_without_a_decoder_compares_latents(entry: Entry, tmp_path: Path) -> None:
    comparison = evaluated(entry, tmp_path)
    row = comparison.rows[0]
    found = comparison.images[row.method, row.target_speedup]
    assert row.psnr_mean == pytest.approx(
        latent_psnr(found, comparison.references).mean().item(), rel=1e-9
    )
    assert row.ssim_mean is None and "latents" in comparison.table()
    assert not (tmp_path / "sheet.png").exists()
    assert json.loads((tmp_path / "results.json").read_text())["rows"][0]["ssim_mean"] is None


def test_frames_of_a_sheet_keep_their_shape() -> None:
    comparison = evaluated(WAN)
    wide = comparison.references[..., :12, :]
    images = {key: value[..., :12, :] for key, value in comparison.images.items()}
    cut = dataclasses.replace(comparison, references=wide, images=images)
    sheet = np.asarray(Image.open(io.BytesIO(image_sheet(cut, ["a", "b"], count=1))).convert("RGB"))
    # 192 x 72 pixels in the middle of a framed cell of 192 x 192, white above and below.
    cell = sheet[10 + 30 + 18 : 10 + 30 + 18 + 192, 150 : 150 + 192][1:-1, 1:-1]
    assert (cell[:58] == 255).all() and (cell[134:] == 255).all()
    assert not (cell[62:130] == 255).all()
