"""Every script of bench/training at tiny size, on pictures drawn here: no font is needed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import FluxPipeline
from PIL import Image, ImageDraw

from bench.training import autoencoder, curve, decoder, export, model, sample, scenes, train
from bench.training.data import Batches
from bench.training.pictures import EMOJI, load_pictures
from bench.training.text import clip_tokenizer, t5_tokenizer, token_ids

SMALL_AUTOENCODER: dict[str, Any] = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4}
SMALL_TRANSFORMER: dict[str, Any] = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "axes_dims_rope": (4, 4, 4),
}


def drawn_pictures() -> dict[str, Image.Image]:
    pictures = {}
    for name, color in {"disc": (230, 40, 40, 255), "blue box": (40, 40, 230, 255)}.items():
        picture = Image.new("RGBA", (40, 40))
        draw = ImageDraw.Draw(picture)
        shape = draw.ellipse if name == "disc" else draw.rectangle
        shape((4, 4, 35, 35), fill=color)
        pictures[name] = picture
    return pictures


@pytest.fixture(scope="module")
def painter() -> scenes.Painter:
    return scenes.Painter(drawn_pictures())


@pytest.fixture(scope="module")
def run_folder(painter: scenes.Painter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose autoencoder and latents are made; no transformer yet."""
    out = tmp_path_factory.mktemp("run")
    untrained = autoencoder.build_autoencoder(**SMALL_AUTOENCODER)
    autoencoder.train_autoencoder(painter, untrained, out, steps=2, batch=2, lr=1e-3, seed=0)
    loaded = autoencoder.load_autoencoder(out, **SMALL_AUTOENCODER)
    autoencoder.encode_dataset(painter, loaded, out, count=12, seed=0)
    return out


def new_trainer(painter: scenes.Painter) -> train.Trainer:
    torch.manual_seed(0)
    painting = model.Painting(scenes.vocabulary(painter.names), **SMALL_TRANSFORMER)
    return train.Trainer(painting, lr=1e-3)


def batches_of(painter: scenes.Painter, run: Path, trainer: train.Trainer) -> Batches:
    cached = torch.load(run / "latents.pt", weights_only=True)
    drawn = autoencoder.dataset_scenes(painter.names, cached["seed"], len(cached["latents"]))
    return Batches(cached["latents"], drawn, trainer.model.tokenizers, 0, 4, long_every=0)


def test_a_scene_is_a_function_of_the_generator(painter: scenes.Painter) -> None:
    first, second = (
        [scenes.training_scene(np.random.default_rng(3), painter.names) for _ in range(5)]
        for _ in range(2)
    )
    assert first == second
    pixels = painter.render(first[0])
    assert pixels.shape == (3, 64, 64)
    assert pixels.min() >= -1 and pixels.max() <= 1


def test_training_scenes_show_no_held_out_combination() -> None:
    rng = np.random.default_rng(0)
    names = list(EMOJI)
    trained = [scenes.training_scene(rng, names) for _ in range(300)]
    assert not any(scenes.is_held_out(scene) for scene in trained)
    kept = [scenes.held_out_scene(rng, names) for _ in range(20)]
    assert all(scenes.held_out(p.name, s.background, p.place) for s in kept for p in s.parts)


def test_captions_name_everything_or_leave_it_open() -> None:
    part = scenes.Part("orange", "small", "at the left", (-16, 0))
    scene = scenes.Scene((part,), "green stripes")
    rng = np.random.default_rng(0)
    full = "a small orange at the left on green stripes"
    assert scenes.describe(scene, rng, openness=0) == full
    assert scenes.describe(scene, rng, openness=1) == "an orange"


def test_pictures_are_read_from_a_folder(tmp_path: Path) -> None:
    for name, picture in drawn_pictures().items():
        picture.save(tmp_path / f"{name.replace(' ', '_')}.png")
    pictures = load_pictures(tmp_path)
    assert set(pictures) == {"disc", "blue box"}
    assert pictures["disc"].size == (32, 32)


def test_pictures_are_read_from_the_font() -> None:
    font = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
    if not font.exists():
        pytest.skip("fonts-noto-color-emoji is not installed: apt-get install it to test this")
    pictures = load_pictures(font)
    assert set(pictures) == set(EMOJI)
    assert all(np.asarray(p)[..., 3].any() for p in pictures.values())


def test_every_word_is_one_token_of_both_vocabularies() -> None:
    words = scenes.vocabulary(list(EMOJI))
    t5, clip = t5_tokenizer(words), clip_tokenizer(words)
    assert token_ids(t5, words, 3)[:, 1].eq(t5.eos_token_id).all()
    assert token_ids(clip, words, 4)[:, 2].eq(clip.eos_token_id).all()
    assert len(set(token_ids(t5, words, 3)[:, 0].tolist())) == len(words)


def test_autoencoder_resumes_where_it_was_killed(painter: scenes.Painter, tmp_path: Path) -> None:
    weights = []
    for name, stops in (("whole", [4]), ("killed", [2, 4])):
        out = tmp_path / name
        out.mkdir()
        for until in stops:
            torch.manual_seed(0)
            untrained = autoencoder.build_autoencoder(**SMALL_AUTOENCODER)
            autoencoder.train_autoencoder(
                painter, untrained, out, steps=4, batch=1, lr=1e-3, seed=0, every=2, until=until
            )
        weights.append(torch.load(out / "autoencoder.pt", weights_only=True)["model"])
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))


def test_decoder_training_leaves_the_encoder_alone(
    painter: scenes.Painter, run_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    before = autoencoder.load_autoencoder(run, **SMALL_AUTOENCODER).state_dict()
    loaded = autoencoder.load_autoencoder(run, **SMALL_AUTOENCODER)
    decoder.train_decoder(painter, loaded, run, steps=2, batch=2, lr=1e-3, seed=0)
    after = autoencoder.load_autoencoder(run, **SMALL_AUTOENCODER).state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder"}


def test_transformer_resumes_where_it_was_killed(
    painter: scenes.Painter, run_folder: Path, tmp_path: Path
) -> None:
    averages = []
    for name, stops in (("whole", [4]), ("killed", [2, 4])):
        out = tmp_path / name
        out.mkdir()
        for until in stops:
            trainer = new_trainer(painter)
            data = batches_of(painter, run_folder, trainer)
            train.run(trainer, data, data, out, steps=4, every=2, until=until)
        averages.append(trainer.average)
        assert len((out / "training_log.csv").read_text().splitlines()) == 2
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in averages), strict=True))


def test_only_scenes_of_the_first_pictures_are_kept() -> None:
    parts = [scenes.Part(n, "large", "in the middle", (0, 0)) for n in ("cat", "key")]
    drawn = [scenes.Scene((parts[0],), "red dots"), scenes.Scene(tuple(parts), "red dots")]
    kept, latents = train.shown_only(drawn, torch.arange(2), {"cat"})
    assert kept == drawn[:1]
    assert latents.tolist() == [0]


def test_commands_run_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, run = tmp_path / "pictures", tmp_path / "run"
    pictures.mkdir()
    for name, picture in drawn_pictures().items():
        picture.save(pictures / f"{name.replace(' ', '_')}.png")
    monkeypatch.setattr(model, "ARCHITECTURE", model.ARCHITECTURE | SMALL_TRANSFORMER)
    monkeypatch.setattr(train, "VALIDATION_SCENES", 2)
    monkeypatch.setattr(train, "VALIDATION_BATCH", 2)
    monkeypatch.setattr(autoencoder, "ARCHITECTURE", autoencoder.ARCHITECTURE | SMALL_AUTOENCODER)
    common = ["--pictures", pictures, "--out", run, "--threads", 1]
    for command, options in (
        (autoencoder.main, ["train", *common, "--steps", 1, "--batch", 1]),
        (autoencoder.main, ["encode", *common, "--count", 4]),
        (decoder.main, [*common, "--steps", 1, "--batch", 1]),
        (train.main, [*common, "--steps", 1, "--batch", 2, "--no-compile"]),
    ):
        outcome = CliRunner().invoke(command, [str(option) for option in options])
        assert outcome.exit_code == 0, outcome.output
    assert [row[0] for row in curve.read_log(run / "training_log.csv")] == [1]
    assert (run / "checkpoint.pt").exists()


def test_the_loss_curve_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    log, out = tmp_path / "log.csv", tmp_path / "loss.png"
    log.write_text("1,2,0.5,0.6\n2,4,0.4,0.5\n2,3,0.3,0.4\n")
    outcome = CliRunner().invoke(curve.main, ["--log", str(log), "--out", str(out)])
    assert outcome.exit_code == 0, outcome.output
    assert curve.read_log(log) == [(1, 2, 0.5, 0.6), (2, 3, 0.3, 0.4)]
    assert Image.open(out).width > 100


def test_a_run_exports_reloads_and_samples(
    painter: scenes.Painter, run_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    trainer = new_trainer(painter)
    data = batches_of(painter, run, trainer)
    train.run(trainer, data, data, run, steps=2, every=2)

    folder = tmp_path / "model"
    export.export(run, folder, transformer=SMALL_TRANSFORMER, autoencoder=SMALL_AUTOENCODER)
    pipe = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    again = train.weights_of_export(folder)
    adopted = tmp_path / "adopted"
    adopted.mkdir()
    autoencoder.adopt_autoencoder(folder, painter, adopted, count=2, seed=0)
    first = torch.load(adopted / "latents.pt", weights_only=True)["latents"].float()
    second = torch.load(run / "latents.pt", weights_only=True)["latents"][:2].float()
    assert torch.allclose(first, second, atol=0.02)
    half = {name: weight.half().float() for name, weight in trainer.average.items()}
    assert all(torch.equal(again[name].float(), half[name]) for name in half)
    image = pipe("a disc", height=64, width=64, num_inference_steps=2, guidance_scale=3.5).images[0]
    assert image.size == (64, 64)

    out = tmp_path / "sheet.png"
    options = ["--model", folder, "--out", out, "--count", 2, "--steps", 2]
    outcome = CliRunner().invoke(sample.main, [str(o) for o in options])
    assert outcome.exit_code == 0, outcome.output
    assert Image.open(out).size == (2 * 192 + 4, 192)
    assert len(out.with_suffix(".txt").read_text().splitlines()) == 2
