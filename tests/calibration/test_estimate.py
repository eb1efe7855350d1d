"""Memory and time: what is stated before a run bounds what the run takes."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch

from layercache.calibration import CalibrationEstimate, calibrate, estimate_calibration
from layercache.calibration._estimate import _replayed_forwards
from layercache.calibration._jobs import Jobs
from layercache.calibration._memory import PeakMemory
from layercache.calibration._replay import RecordedCall, ReplayableTransformer
from layercache.calibration._timing import Clock, StepTimes
from layercache.errors import StatsError
from layercache.models import adapter_for
from layercache.stats import Group
from tests.calibration.test_calibrate import PROMPTS, measure
from tests.tiny import tiny_arguments, tiny_pipeline

CPU = torch.device("cpu")


def estimate(**changes: Any) -> CalibrationEstimate:
    options: dict[str, Any] = {
        "num_inference_steps": 8,
        "groups": 2,
        "lags": 3,
        "call_kwargs": tiny_arguments(),
    }
    return estimate_calibration(tiny_pipeline(), PROMPTS, **(options | changes))


def test_peak_memory_counts_what_lives_at_once() -> None:
    weight = torch.ones(100, 100)
    with PeakMemory(CPU) as memory:
        first = weight + 1
        assert memory.live == 40_000
        second = first * first
        del first
        view = second[:10].t()
        assert (memory.live, memory.lap()) == (40_000, 80_000)
        view.add_(1)
        assert memory.lap() == 40_000
        del second, view
        assert memory.live == 0
    assert memory.peak == 80_000
    assert weight.t().shape == (100, 100), "what was there before is not counted"


@pytest.mark.parametrize("mode", ["replay", "residual"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_peak_stays_below_the_stated_bound(mode: str, batch_size: int) -> None:
    said: list[str] = []
    pipe = tiny_pipeline()
    stated = estimate(mode=mode, batch_size=batch_size)
    with PeakMemory(CPU) as memory:
        calibrate(
            pipe,
            PROMPTS,
            num_inference_steps=8,
            groups=2,
            lags=3,
            mode=mode,
            batch_size=batch_size,
            call_kwargs=tiny_arguments(),
            progress=False,
            log=said.append,
        )
    assert memory.peak <= stated.peak_bytes
    assert stated.peak_bytes < 4 * memory.peak, "a bound that says something"
    assert len(said) == 1 and said[0].startswith(f"calibration of 2 prompts, {mode} mode: about ")
    assert "above the model" in said[0] and "full generations a prompt" in said[0]


@pytest.mark.parametrize("mode", ["replay", "residual"])
def test_the_bound_holds_for_a_last_batch_with_a_longer_text(mode: str) -> None:
    prompts = ["a circle", "a ring", " ".join(["a large red circle"] * 80)]
    options: dict[str, Any] = {
        "num_inference_steps": 4, "groups": 4, "lags": 3, "mode": mode, "batch_size": 2,
        "call_kwargs": tiny_arguments(),
    }  # fmt: skip
    pipe = tiny_pipeline()
    stated = estimate_calibration(pipe, prompts, **options)
    with PeakMemory(CPU) as memory:
        calibrate(pipe, prompts, progress=False, **options)
    assert memory.peak <= stated.peak_bytes


def test_nothing_of_a_run_outlives_it() -> None:
    pipe, options = tiny_pipeline(), {"num_inference_steps": 4, "call_kwargs": tiny_arguments()}
    gc.disable()
    try:
        with PeakMemory(CPU) as memory:
            estimate_calibration(pipe, PROMPTS, **options)
            after_estimate = memory.live
            calibrate(pipe, PROMPTS, progress=False, **options)
            after_run = memory.live
    finally:
        gc.enable()
    assert max(after_estimate, after_run) < 0.02 * memory.peak


def test_lags_that_a_run_never_reaches_take_no_memory() -> None:
    assert estimate(lags=7).lags_together == estimate(lags=20).lags_together
    assert Jobs("replay", 8, 2, 20).history == 7 and Jobs("replay", 1, 2, 20).history == 1


def test_a_tighter_bound_replays_fewer_lags_together_with_the_same_result() -> None:
    free = estimate(sketch_size=4096)
    assert free.lags_together == 3 and not free.offload
    bound = free.peak_bytes - free.kept_bytes - 1
    alone = estimate(sketch_size=4096, max_memory=bound)
    assert alone.lags_together < 3 and alone.peak_bytes <= bound
    options: dict[str, Any] = {"num_inference_steps": 8}
    loose = measure(tiny_pipeline(), **options)
    tight = measure(tiny_pipeline(), max_memory=alone.peak_bytes, **options)
    np.testing.assert_allclose(tight.deltas, loose.deltas, atol=1e-4)


def test_outputs_that_memory_has_no_room_for_go_to_the_disk_with_the_same_result() -> None:
    free = estimate(sketch_size=4096)
    assert free.disk_bytes == 0 < free.kept_bytes
    bound = free.peak_bytes - free.kept_bytes // 2
    half = estimate(sketch_size=4096, max_memory=bound)
    assert half.disk_bytes > 0 and half.lags_together == free.lags_together
    assert half.peak_bytes <= bound
    options: dict[str, Any] = {"num_inference_steps": 8}
    loose = measure(tiny_pipeline(), **options)
    tight = measure(tiny_pipeline(), max_memory=bound, **options)
    np.testing.assert_array_equal(tight.deltas, loose.deltas)


def test_a_bound_that_cannot_be_kept_is_refused_with_the_smallest_that_can() -> None:
    with pytest.raises(StatsError, match=r"needs at least .* above the model.*max_memory=1000"):
        estimate(max_memory=1000)


def test_costs_are_counted_in_full_generations() -> None:
    found = estimate(num_inference_steps=20, lags=4, groups=4, probes=0)
    # Twenty forwards, and replays of 1.5 forwards a lag at most.
    assert found.generations > 1
    assert estimate(num_inference_steps=20, mode="residual").generations < 2
    assert found.prompts == 2 and found.batch_size == 1
    assert found.file_bytes == 2 * 20 * (2 + 4 * 4) * 1024 * 4


def test_a_replay_costs_the_groups_behind_it() -> None:
    jobs = Jobs("replay", steps=4, groups=3, lags=2)
    # Lags 1, 2, 2 at the three steps with a history: five replays a group, and at one step of every
    # two, which leave out the second.
    seconds = np.array([3.0, 2.0, 1.0, 4.0])
    expected = (5 * ((2 + 1 + 4) + (1 + 4) + 4) + (1 + 4) + (2 + 4) + 4) / 10
    assert jobs.joint_steps == (2,)
    found = sum(_replayed_forwards(jobs, step, seconds) for step in range(4))
    assert found == pytest.approx(expected)


def test_two_groups_at_a_time_are_few_of_the_replays() -> None:
    assert Jobs("replay", 50, 4, 8).joint_steps == (1, 13, 25, 37, 49)
    assert Jobs("replay", 50, 1, 8).joint_steps == Jobs("residual", 50, 4, 8).joint_steps == ()
    for groups in (2, 5, 16, 60, 200):
        for steps in (1, 2, 3, 9, 50):
            jobs = Jobs("replay", steps, groups, 4)
            replays = [replay for step in range(steps) for replay in jobs.at(step)]
            joint = [groups for groups, _ in replays if len(groups) == 2]
            assert len(joint) <= (len(replays) - len(joint)) / 4
            assert len(joint) == len(jobs.couples) * len(jobs.joint_steps)


def test_times_split_a_step_into_groups_rest_and_outside() -> None:
    times = StepTimes(Clock(CPU), groups=2)
    for scale in (9.0, 9.0, 1.0, 2.0, 3.0):  # the first two are cold
        times.group(0, 0.0, scale * 1e-3)
        times.group(1, 0.0, scale * 2e-3)
        times.aside(0.0, scale * 1e-3)
        times.call(0.0, scale * 5e-3)
        times.outside(0.0, scale * 7e-3)
        times.end_step()
    # Four milliseconds outside the groups of the call, of seven two are the call's and one ours.
    np.testing.assert_allclose(times.median_ms(np.ones((5, 3))), [2.0, 4.0, 4.0, 2.0])
    # A step that had half to do counts as what it would have taken in full.
    loads = np.array([[1.0] * 3, [1.0] * 3, [0.5] * 3, [1.0] * 3, [1.0] * 3])
    np.testing.assert_allclose(times.median_ms(loads), [2.0, 4.0, 4.0, 2.0])


def test_calibrated_times_are_positive_and_add_up() -> None:
    stats = measure(tiny_pipeline(), num_inference_steps=8)
    assert (stats.times_ms[:, :3] > 0).all()
    assert stats.overhead_ms > 0


class OffDevice(ReplayableTransformer):
    """As on a GPU: what is held counts as moved away, although there is no other device here."""

    @property
    def _moves(self) -> bool:
        return self.offload


def test_at_most_the_current_step_and_as_many_as_lags_are_held() -> None:
    pipe = tiny_pipeline()
    groups = (
        Group(block_list="transformer_blocks", start=0, stop=2),
        Group(block_list="transformer_blocks", start=2, stop=4),
    )
    lags, held, batch = 3, [], {"z": torch.randn(1, 64, 48), "text": torch.randn(1, 3, 64)}
    replayable = OffDevice(
        pipe.transformer, adapter_for(pipe.transformer), groups, lags, offload=True
    )

    def step(number: int) -> RecordedCall:
        time = torch.full((1,), 1 - number / 8)
        args = (batch["z"], batch["text"], None, time, [[(1, 8, 8)]])
        return replayable.record(number, 0, pipe.transformer, args, {})

    try:
        with torch.no_grad():
            for number in range(8):
                call = step(number)
                held.append(replayable.held_bytes(call))
            residual = sum(replayable.residual_bytes(7, g) for g in range(2))
            outputs = held[0] - residual
            expected = [outputs + residual * min(n + 1, lags + 1) for n in range(8)]
            assert held == expected
            assert replayable.available(call, (1,), [1, 2, 3, 4]) == [1, 2, 3]
            exact = replayable.replay(call, (1,), [1])[0][0]
            assert exact.shape == (1, 64, 48)
            replayable.clear()
            assert replayable.residual_bytes(7, 0) == 0
    finally:
        replayable.remove()
