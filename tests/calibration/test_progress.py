"""Progress bars: even, of the right prompts, and quiet off a terminal."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest

from layercache.calibration import calibrate
from layercache.calibration._session import Session
from layercache.calibration.prompts import batches
from layercache.models.pipelines import loop_owners, run_pipeline
from layercache.reference import prompts
from tests.runtime import modular
from tests.tiny import tiny_arguments, tiny_pipeline

STEPS = 8


class Terminal(io.StringIO):
    """What a person watches."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline()


def run(pipe: Any, names: list[str], **options: Any) -> None:
    options = {"num_inference_steps": STEPS, "groups": 2, "lags": 3} | options
    calibrate(pipe, names, call_kwargs=tiny_arguments(), **options)


@pytest.mark.parametrize("mode", ["replay", "residual"])
@pytest.mark.parametrize("size", [1, 2])
def test_the_bar_moves_from_the_first_stage_to_the_last(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, mode: str, size: int
) -> None:
    shares: list[list[float]] = []
    measure = Session.measure

    def watched(self: Session, batch: Any, tick: Any) -> Any:
        mine: list[float] = []
        shares.append(mine)
        return measure(self, batch, lambda share: (mine.append(share), tick(share)))

    monkeypatch.setattr(Session, "measure", watched)
    run(pipe, prompts("calibration", 2), batch_size=size, mode=mode, probes=3, progress=False)
    assert len(shares) == 2 // size
    for mine in shares:
        assert all(share > 0 for share in mine)
        # Loading text encoders, decoding and checks are no part of what is told.
        assert sum(mine) <= 1 + 1e-9
        assert len(mine) > STEPS, "replays read and runs probed count as well as recorded steps"


def test_what_is_told_adds_up_to_what_was_estimated(pipe: Any) -> None:
    from layercache.calibration._estimate import CalibrationEstimate
    from layercache.calibration._grouping import split_groups
    from layercache.calibration._options import Options

    options = Options(num_inference_steps=STEPS, lags=3, probes=3)
    groups = split_groups({"transformer_blocks": 4}, 2)
    arguments = {**tiny_arguments(), "num_inference_steps": STEPS}
    session = Session(pipe, {"transformer": groups}, options, arguments)
    work = batches(prompts("calibration", 1), 0, 1, arguments)
    found: CalibrationEstimate = session.estimate(work)
    told: list[float] = []
    session.measure(work[0], told.append)
    assert tuple(told[:STEPS]) == found.pace.recorded
    # A later step has more lags to replay.
    assert found.pace.recorded[0] < found.pace.recorded[3]
    assert told.count(found.pace.loop) >= 2 * 3


def test_the_bar_names_the_prompts_that_are_measured(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = prompts("calibration", 5)
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    run(pipe, names, batch_size=2, mode="residual", parts=tmp_path)
    found = dict.fromkeys(re.findall(r"prompts? [\d-]+ of \d+", shown.getvalue()))
    assert list(found) == ["prompts 1-2 of 5", "prompts 3-4 of 5", "prompt 5 of 5"]
    assert "100%" in shown.getvalue()
    # Of a run that goes on, the prompts keep their places.
    sorted(tmp_path.glob("*.npz"))[0].unlink()
    shown.seek(0)
    shown.truncate()
    run(pipe, names, batch_size=2, mode="residual", parts=tmp_path)
    found = dict.fromkeys(re.findall(r"prompts? [\d-]+ of \d+", shown.getvalue()))
    assert len(found) == 1


def test_off_a_terminal_nothing_is_drawn(pipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pipe.set_progress_bar_config()
    try:
        run(pipe, prompts("calibration", 1), mode="residual")
    finally:
        pipe.set_progress_bar_config(disable=True)
    assert capsys.readouterr().err == ""


def test_the_bar_of_the_pipeline_keeps_quiet_and_is_then_as_it_was(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    arguments = tiny_arguments(num_inference_steps=2, seed=0) | {"prompt": "a red circle"}
    asked = {"desc": "mine", "disable": False}
    pipe.set_progress_bar_config(**asked)
    try:
        run_pipeline(pipe, arguments)
        assert shown.getvalue() == ""
        pipe(**arguments)
        assert "mine" in shown.getvalue()
        with pytest.raises((TypeError, ValueError)):
            run_pipeline(pipe, arguments | {"height": "tall"})
        assert vars(pipe)["_progress_bar_config"] == asked
    finally:
        pipe.set_progress_bar_config(disable=True)


@pytest.mark.parametrize("name", modular.MODULAR)
def test_the_bars_of_a_modular_pipeline_keep_quiet(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, call = modular.build(name)
    owners = list(loop_owners(made))
    for owner in owners:
        if hasattr(owner, "set_progress_bar_config"):
            owner.set_progress_bar_config()
    taken: dict[str, Any] = {}

    class Watched:
        """Keeps the arguments of the call."""

        def __call__(self, **kwargs: Any) -> Any:
            taken.update(kwargs)
            return made(**kwargs)

    call(on=Watched())
    before = [dict(vars(owner)) for owner in owners]
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    run_pipeline(made, {key: value for key, value in taken.items() if key != "output"})
    assert shown.getvalue() == ""
    keys = "_progress_bar_config"
    assert [vars(owner).get(keys) for owner in owners] == [held.get(keys) for held in before]
