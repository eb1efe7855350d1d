"""The report: planned next to seen, by unit and branch, with bytes and time."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from layercache.models.clock import Clock
from layercache.runtime import apply_plan
from layercache.runtime._record import Record
from tests.runtime.harness import group, make_plan, step
from tests.runtime.mixed import LIST, MIXED, STEPS, pipeline

BRANCHES = ["cond", "uncond"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A clock that stands still but for what a test adds to it."""
    moment = {"now": 1.0}
    monkeypatch.setattr(Clock, "mark", lambda self: moment["now"])
    return moment


def taking(module: nn.Module, seconds: float, clock: dict[str, float]) -> None:
    """Make every call of a module take so long."""

    def wait(module: nn.Module, args: Any) -> None:
        clock["now"] += seconds

    module.register_forward_pre_hook(wait)


def test_counts_bytes_and_times_by_unit_and_branch(clock: dict[str, float]) -> None:
    pipe = pipeline()
    for index, block in enumerate(pipe.transformer.transformer_blocks):
        taking(block, 10.0**index, clock)
    units = [*MIXED[:2], group(LIST, 2, 3, "##0.#3")]
    with warnings.catch_warnings(), apply_plan(pipe, make_plan(pipe, STEPS, units)) as run:
        warnings.simplefilter("error")
        pipe(STEPS)
        pipe(STEPS)
    report = run.report()
    assert report.runs == 2
    assert report.steps_seen == report.steps_planned == STEPS
    assert report.steps_elsewhere == 0
    assert report.warnings == ()
    for unit in report.units:
        assert list(unit.seen_computed) == BRANCHES
        assert set(unit.seen_computed.values()) == {unit.planned_computed}
        assert set(unit.seen_predicted.values()) == {unit.planned_predicted}
        assert unit.bytes_seen == unit.bytes_planned
        assert all(unit.bytes_seen[branch] > 0 for branch in BRANCHES)
        assert unit.seconds_predicted == {"cond": 0.0, "uncond": 0.0}
    whole, first, second = report.units
    # Steps 0, 1 and 5 compute both groups, 2 neither, 4 the second; block 3 is in none.
    assert first.seconds_computed == {"cond": 33.0, "uncond": 33.0}
    assert second.seconds_computed == {"cond": 300.0, "uncond": 300.0}
    assert whole.seconds_computed == {"cond": 5333.0, "uncond": 5333.0}
    # Residuals of both streams: two tensors of (2, 16 + 5, 32) floats at the busiest.
    assert first.bytes_seen["cond"] == 2 * 2 * 21 * 32 * 4
    # Guided outputs belong to both branches: two of (2, 16, 16) at the busiest.
    assert whole.bytes_seen["guided"] == 2 * 2 * 16 * 16 * 4
    assert json.loads(json.dumps(report.to_dict()))["units"][0]["name"] == "step"
    text = str(report)
    assert "5333000.0 ms" in text and "computed (planned)" in text
    assert len(text.splitlines()) == 2 + 3 * 2


def test_a_group_that_is_only_computed_is_timed_too(clock: dict[str, float]) -> None:
    pipe = pipeline()
    for index, block in enumerate(pipe.transformer.transformer_blocks):
        taking(block, 10.0**index, clock)
    plan = make_plan(pipe, 2, [group(LIST, 0, 3, "##"), group(LIST, 3, 4, "##")])
    with apply_plan(pipe, plan) as run:
        pipe(2)
    first, second = run.report().units
    assert first.seconds_computed == {"cond": 222.0, "uncond": 222.0}
    assert second.seconds_computed == {"cond": 2000.0, "uncond": 2000.0}
    assert first.seen_computed == {"cond": 2, "uncond": 2}
    assert first.bytes_seen == {"cond": 0, "uncond": 0}
    assert run.report().cache_bytes_seen == 0


def test_a_difference_is_a_warning_when_the_run_ends_and_in_the_report() -> None:
    pipe = pipeline()
    with apply_plan(pipe, make_plan(pipe, STEPS, [step("###000")])) as run:
        with pytest.warns(UserWarning, match=r"step: what step 3") as caught:
            pipe(STEPS, start=3)
            pipe(STEPS, start=3)
        # Once a plan, not once a run.
        assert len(caught) == 1
        warning = run.report().warnings
        assert any("3 of 6 planned steps were run" in text for text in warning)
        assert "warning:" in str(run.report())


def test_a_plan_that_was_not_used_says_so() -> None:
    pipe = pipeline()
    with apply_plan(pipe, make_plan(pipe, STEPS, MIXED)) as run:
        assert run.report().warnings == ("the pipeline has not been run under this plan",)
        assert "not been run" in str(run.report())


class FakeEvent:
    """Stands in for `torch.cuda.Event`; time is counted in records."""

    now = 0
    waits = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: str) -> None:
        assert stream == "stream"
        FakeEvent.now += 1
        self.at = FakeEvent.now

    def synchronize(self) -> None:
        FakeEvent.waits += 1

    def elapsed_time(self, other: FakeEvent) -> float:
        return 1e3 * (other.at - self.at)


def test_device_times_are_waited_for_only_when_they_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    clock, record, branch = Clock(torch.device("cuda", 0)), Record(), (None, 0)
    for at in range(3):
        start = clock.mark()
        record.count("step", branch, at, True, start, clock.mark())
    assert FakeEvent.waits == 0
    assert record._time("step", branch, True, timed=False) == 0.0 and FakeEvent.waits == 0
    assert record._time("step", branch, True, timed=True) == 3.0
    assert FakeEvent.waits == 3
    clock.device = torch.device("cpu")
    start = clock.mark()
    record.count("step", branch, 3, True, start, clock.mark())
    assert 3.0 < record._time("step", branch, True, timed=True) < 4.0


def test_no_run_reads_device_times_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning at the end of a run that differed is made without waiting for the device."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    cuda = torch.device("cuda", 0)
    # Every device is this one, whatever a run says.
    monkeypatch.setattr(Clock, "device", property(lambda self: cuda, lambda *_: None), False)
    FakeEvent.waits = 0
    pipe = pipeline()
    with apply_plan(pipe, make_plan(pipe, STEPS, [step("###000")])) as run:
        with pytest.warns(UserWarning, match="differed"):
            pipe(STEPS, start=3)
        assert FakeEvent.waits == 0
        assert run.report().units[0].seconds_computed["cond"] > 0
    assert FakeEvent.waits > 0
