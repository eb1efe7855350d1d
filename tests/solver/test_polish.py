"""Annealing over step schedules. Oracle: `fit_gains`, which assembles errors from sketches."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from layercache.compile import compile_plan
from layercache.solver import gains as gains_module
from layercache.solver.gains import AffineError, mean_log10
from layercache.solver.polish import RIDGE, StepPolish
from layercache.solver.pricing import STEP_NAME
from layercache.solver.problem import BoolArray
from layercache.solver.solution import UnitSchedule
from layercache.stats import CalibrationStats, Group

STEPS = 12


def smooth_stats(seed: int = 0, prompts: int = 4) -> CalibrationStats:
    """Velocities that bend smoothly along the trajectory, as a model's do."""
    rng = np.random.default_rng(seed)
    sigmas = np.linspace(1.0, 0.0, STEPS + 1)
    phase = rng.uniform(0, 3, (prompts, 1, 16))
    speed = rng.uniform(1, 4, (1, 1, 16))
    velocities = np.sin(phase + speed * sigmas[None, :-1, None])
    return CalibrationStats(
        sigmas=sigmas,
        groups=(Group(block_list="blocks", start=0, stop=2),),
        branches=1,
        velocities=velocities.astype(np.float32),
        deltas=np.zeros((prompts, STEPS, 1, 4, 16), dtype=np.float32),
        times_ms=np.tile([8.0, 1.0, 0.5], (prompts, 1)),
        image_gain=np.full(prompts, 0.06),
        group_bytes=(64,),
        velocity_bytes=64,
        output_bytes=64,
        numel=16,
        sketch_seed=0,
        prompt_ids=tuple("abcd"[:prompts]),
        model={"class_name": "M", "block_lists": {"blocks": 2}, "architecture": "x"},
        setting={},
        amplification=np.tile(np.linspace(3.0, 1.0, STEPS), (prompts, 1)),
    )


def schedule_of(run: BoolArray) -> UnitSchedule:
    """Anchor and base of every skipped step: the last two run steps before it."""
    anchor, base = np.full(STEPS, -1), np.full(STEPS, -1)
    for step in np.flatnonzero(~run):
        before = np.flatnonzero(run[:step])
        anchor[step] = before[-1]
        base[step] = before[-2] if len(before) > 1 else -1
    return UnitSchedule(name=STEP_NAME, refresh=run, anchor=anchor, base=base)


@pytest.mark.parametrize("seed", range(8))
def test_the_score_is_that_of_the_gains(seed: int) -> None:
    stats = smooth_stats(seed)
    run = np.random.default_rng(seed).random(STEPS) < 0.6
    run[0], run[1], run[5] = True, True, False
    system: AffineError = gains_module._assemble(stats, [schedule_of(run)], True)
    expected = mean_log10(system.leave_one_out(RIDGE))
    assert StepPolish(stats).score(run) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_the_search_keeps_the_number_of_steps_and_is_never_worse_than_climbing(seed: int) -> None:
    polish = StepPolish(smooth_stats(seed))
    run = np.zeros(STEPS, dtype=bool)
    run[:6] = True
    climbed, found = polish.climb(run), polish.search(run)
    assert found[0] and found.sum() == climbed.sum() == run.sum()
    assert polish.score(found) <= polish.score(climbed) < polish.score(run)
    assert (StepPolish(smooth_stats(seed)).search(run) == found).all()


def test_the_search_finds_the_best_of_all_schedules() -> None:
    """Oracle: every schedule of six of twelve steps."""
    polish = StepPolish(smooth_stats(2))
    run = np.zeros(STEPS, dtype=bool)
    run[:6] = True
    scores = []
    for chosen in itertools.combinations(range(1, STEPS), 5):
        mask = np.zeros(STEPS, dtype=bool)
        mask[[0, *chosen]] = True
        scores.append(polish.score(mask))
    found = polish.score(polish.search(run))
    assert found <= np.quantile(scores, 0.01)
    assert found >= min(scores)


def test_forced_steps_and_gaps_stay() -> None:
    run = np.zeros(STEPS, dtype=bool)
    run[:6] = True
    polish = StepPolish(smooth_stats(), forced=frozenset({4, 5}), max_gap=6)
    found = polish.search(run)
    assert found[[4, 5]].all()
    assert np.diff(np.append(np.flatnonzero(found), STEPS)).max() <= 7


def test_everything_computed_is_left_alone() -> None:
    assert StepPolish(smooth_stats()).search(np.ones(STEPS, dtype=bool)).all()


def test_compilation_considers_the_polished_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[BoolArray] = []
    search = StepPolish.search

    def spy(self: StepPolish, run: BoolArray) -> BoolArray:
        seen.append(search(self, run))
        return seen[-1]

    monkeypatch.setattr(StepPolish, "search", spy)
    plan = compile_plan(smooth_stats(1), 0.5, units=("step",))
    assert plan.predicted.compute_share <= 0.5
    assert len(seen) == 1 and seen[0].sum() == sum(plan.run_steps)
