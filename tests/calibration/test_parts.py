"""One file a prompt: killed runs resume, and files of other runs are refused."""

from __future__ import annotations

import multiprocessing
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from layercache.calibration import calibrate
from layercache.calibration._parts import Parts
from layercache.calibration._session import Session
from layercache.calibration.prompts import prompt_id
from layercache.errors import ModelMismatchError, StatsError
from layercache.stats import CalibrationStats
from tests.calibration.worker import PROMPTS, calibrate_tiny, run
from tests.tiny import tiny_arguments, tiny_pipeline

FEW = PROMPTS[:3]


def same_statistics(a: CalibrationStats, b: CalibrationStats) -> None:
    """Equal in all but the measured times."""
    assert a.identity == b.identity and a.prompt_ids == b.prompt_ids
    assert a.group_bytes == b.group_bytes
    for name in ("velocities", "deltas", "image_gain", "amplification"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=0, atol=1e-6)


def test_every_prompt_gets_a_file_of_its_own(tmp_path: Path) -> None:
    stats = calibrate_tiny(tmp_path, FEW)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == sorted(f"{prompt_id(text, 0)}.npz" for text in FEW)
    merged = [CalibrationStats.load(path) for path in tmp_path.iterdir()]
    same_statistics(merged[0].merge(merged[1]).merge(merged[2]), stats)


def test_finished_prompts_are_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = calibrate_tiny(tmp_path, FEW)
    Parts(tmp_path).path(prompt_id(FEW[1], 0)).unlink()
    measured: list[Any] = []
    original = Session.measure
    monkeypatch.setattr(
        Session,
        "measure",
        lambda self, batch, tick: measured.append(batch.ids) or original(self, batch, tick),
    )
    said: list[str] = []
    same_statistics(calibrate_tiny(tmp_path, FEW, log=said.append), whole)
    assert measured == [(prompt_id(FEW[1], 0),)]
    assert said[0].startswith("resuming: 2 prompts are in ")
    assert said[1].startswith("calibration of 1 prompts, replay mode: about ")
    same_statistics(calibrate_tiny(tmp_path, FEW), whole)
    assert len(measured) == 1, "nothing was left to do"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lags": 1}, r"lags differs \(1 and 2\)"),
        ({"groups": 1}, "groups differs"),
        ({"sketch_size": 512}, r"sketch_size differs \(512 and 1024\)"),
        ({"mode": "residual"}, r"mode differs \('residual' and 'replay'\)"),
        ({"probes": 1}, r"probes differs \(1 and 6\)"),
        ({"call_kwargs": {"true_cfg_scale": 2.0}}, r"true_cfg_scale differs \(2.0 and 4.0\)"),
    ],
)
def test_files_of_another_run_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    calibrate_tiny(tmp_path, FEW[:1])
    call = tiny_arguments() | changes.pop("call_kwargs", {})
    options = {"num_inference_steps": 4, "groups": 2, "lags": 2, "call_kwargs": call} | changes
    with pytest.raises(ModelMismatchError, match=message):
        calibrate(tiny_pipeline(), FEW, parts=tmp_path, progress=False, **options)


def test_another_schedule_is_noticed_before_the_run(tmp_path: Path) -> None:
    calibrate_tiny(tmp_path, FEW[:1])
    pipe, call = tiny_pipeline(), tiny_arguments(sigmas=[1.0, 0.7, 0.5, 0.2])
    options: dict[str, Any] = {
        "num_inference_steps": 4, "groups": 2, "lags": 2, "parts": tmp_path, "progress": False,
    }  # fmt: skip
    with pytest.raises(ModelMismatchError, match=r"setting.call.sigmas differs"):
        calibrate(pipe, FEW, call_kwargs=call, **options)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_karras_sigmas=True)
    with pytest.raises(ModelMismatchError, match=r"sigmas\[1\] differs"):
        calibrate(pipe, FEW, call_kwargs=tiny_arguments(), **options)
    assert len(list(tmp_path.iterdir())) == 1


def test_auto_groups_are_those_that_were_found_before(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "num_inference_steps": 4, "lags": 2, "parts": tmp_path, "call_kwargs": tiny_arguments(),
        "progress": False,
    }  # fmt: skip
    first = calibrate(tiny_pipeline(), FEW[:1], groups="0:3,3:4", **options)
    said: list[str] = []
    both = calibrate(tiny_pipeline(), FEW[:2], groups="auto:2", log=said.append, **options)
    assert both.groups == first.groups and both.num_prompts == 2
    assert not any(text.startswith("finding groups") for text in said)
    with pytest.raises(ModelMismatchError, match=r"number of groups differs \(3 and 2\)"):
        calibrate(tiny_pipeline(), FEW[:2], groups="auto:3", **options)


def test_auto_groups_are_not_those_of_another_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "num_inference_steps": 4, "lags": 2, "parts": tmp_path, "progress": False,
    }  # fmt: skip
    call = tiny_arguments(true_cfg_scale=2.0)
    calibrate(tiny_pipeline(), FEW[:1], groups="0:3,3:4", call_kwargs=call, **options)
    said: list[str] = []
    options["call_kwargs"] = tiny_arguments()
    calibrate(tiny_pipeline(), FEW[1:2], groups="auto:2", log=said.append, **options)
    assert any(text.startswith("finding groups") for text in said)


def test_files_of_other_arguments_are_refused(tmp_path: Path) -> None:
    calibrate_tiny(tmp_path, FEW[:1])
    call = tiny_arguments(negative_prompt="a circle")
    with pytest.raises(ModelMismatchError, match=r"call\.negative_prompt differs"):
        calibrate(
            tiny_pipeline(), FEW[:1], parts=tmp_path, progress=False, num_inference_steps=4,
            groups=2, lags=2, call_kwargs=call,
        )  # fmt: skip


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    calibrate_tiny(tmp_path, FEW[:1])
    path = Parts(tmp_path).path(prompt_id(FEW[0], 0))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StatsError, match=f"{path.name}: not a whole statistics file"):
        calibrate_tiny(tmp_path, FEW)


def test_a_file_under_another_name_is_refused(tmp_path: Path) -> None:
    calibrate_tiny(tmp_path, FEW[:1])
    parts = Parts(tmp_path)
    parts.path(prompt_id(FEW[0], 0)).rename(parts.path(prompt_id(FEW[1], 0)))
    with pytest.raises(StatsError, match="holds other prompts than its name says"):
        calibrate_tiny(tmp_path, FEW)


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path) -> None:
    identity = prompt_id(FEW[0], 0)
    stale = tmp_path / f"{identity}.npz.123.partial"
    stale.write_bytes(b"half")
    calibrate_tiny(tmp_path, FEW[:1])
    assert [path.name for path in tmp_path.iterdir()] == [f"{identity}.npz"]


@pytest.mark.slow
def test_killed_at_random_moments_it_loses_no_finished_prompt(tmp_path: Path) -> None:
    """Twenty kills, resumed each time; a fresh folder whenever a run came to its end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.calibration.worker"])
    rng = random.Random(0)
    whole = calibrate_tiny(None)
    folder, round_number = tmp_path / "0", 0
    finished: dict[str, bytes] = {}
    for warm_up in ("cold", "warm"):
        began = time.monotonic()
        child = context.Process(target=run, args=(str(tmp_path / warm_up),))
        child.start()
        child.join()
        assert child.exitcode == 0
    duration = time.monotonic() - began
    for kill in range(20):
        if kill == 0 or len(finished) == len(PROMPTS):
            round_number += 1
            folder, finished = tmp_path / str(round_number), {}
        child = context.Process(target=run, args=(str(folder),))
        child.start()
        child.join(rng.uniform(0, 0.8) * duration)
        child.kill()
        child.join()
        for name, data in finished.items():
            assert (folder / name).read_bytes() == data, "a finished prompt was lost or redone"
        for path in folder.glob("*.npz"):
            assert CalibrationStats.load(path).num_prompts == 1, "a file is whole or not there"
            finished[path.name] = path.read_bytes()
    same_statistics(calibrate_tiny(folder), whole)
    assert not list(folder.glob("*.partial"))
