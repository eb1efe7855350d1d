"""The error model. Oracles: trajectories that are extrapolated exactly, and plain loops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from layercache.prediction._vectors import fold, short
from layercache.prediction.error import ErrorModel, mean_log10, moves_as_euler, predicted_psnr
from layercache.stats import CalibrationStats
from tests.prediction.oracle import polynomial_stats, random_table
from tests.prediction.strategies import random_stats


def unmeasured(stats: CalibrationStats) -> CalibrationStats:
    """Without responses."""
    return replace(stats, responses=np.zeros(0), response_sigmas=np.zeros(0))


def skipping(stats: CalibrationStats, run: list[int]) -> np.ndarray:
    """(T, 1+G) everything computed at some steps."""
    mask = np.isin(np.arange(stats.num_steps), run)
    return np.repeat(mask[:, None], 1 + stats.num_groups, axis=1)


@pytest.mark.parametrize(
    ("degree", "predictor", "run"),
    [
        (0, "reuse", [0, 4, 7]),
        (1, "published", [0, 1, 2, 5, 8, 10]),
        (1, "fitted", [0, 1, 4, 7, 11]),
        (2, "fitted", [0, 1, 2, 3, 6, 9]),
    ],
)
def test_a_polynomial_is_skipped_without_error(degree: int, predictor: str, run: list[int]) -> None:
    stats = polynomial_stats(degree)
    reuse = ErrorModel(stats, "reuse").fit(skipping(stats, run)).error
    fit = ErrorModel(stats, predictor).fit(skipping(stats, run))
    scale = 1e-9 if degree == 0 else 1e-6 * reuse.max()
    assert fit.error.max() <= scale
    short_of = ErrorModel(polynomial_stats(degree + 2), predictor).fit(skipping(stats, run))
    assert short_of.error.min() > 1e-6


def test_other_samplers_are_matched_by_their_own_moves() -> None:
    """A sampler that moves by 1.5 v_t - 0.5 v_{t-1} is one tap of 0.5, though it is not Euler's."""
    stats = random_stats(0, noise=0.0)
    velocity, length = stats.velocities.astype(float), np.diff(stats.sigmas)
    used = velocity.copy()
    used[:, 1:] = 1.5 * velocity[:, 1:] - 0.5 * velocity[:, :-1]
    moved = np.cumsum(length[:, None] * used, axis=1)
    latents = np.pad(moved, ((0, 0), (1, 0), (0, 0))).astype(np.float32)
    other = replace(stats, latents=latents, setting={"scheduler": "UniPCMultistepScheduler"})
    assert not moves_as_euler(other)
    assert moves_as_euler(stats)
    # From the one skipped step on the plan moves the latent itself: one stretch is not exact, and
    # the rows after it do what the sampler does.
    run = [step for step in range(stats.num_steps) if step != 4]
    taps = ErrorModel(other).fit(skipping(stats, run)).taps
    assert taps[:3] == ((), (), ())
    alone = ErrorModel(other, depth=1)
    late = [alone.fit(skipping(stats, run)).taps[step] for step in range(7, stats.num_steps)]
    assert np.median(np.array(late)) == pytest.approx(0.5, abs=0.05)


def test_before_the_first_skipped_step_nothing_is_touched() -> None:
    stats = random_stats(1)
    taps = ErrorModel(stats).fit(skipping(stats, [0, 1, 2, 3, 5, 8])).taps
    assert taps[:3] == ((), (), ())
    assert all(len(taps[step]) > 0 for step in (3, 5, 8))
    assert all(taps[step] == () for step in (4, 6, 7))


def test_a_cached_group_moves_the_velocity_by_its_delta() -> None:
    """Oracle: one cached cell, everything else computed, no taps: the error is that cell's."""
    stats = random_stats(2)
    computed = np.ones((stats.num_steps, 1 + stats.num_groups), dtype=bool)
    computed[5, 2] = False
    fit = ErrorModel(stats, "reuse").fit(computed)
    delta = stats.deltas[:, 5, 1, 0].astype(float)
    length = float(stats.sigmas[6] - stats.sigmas[5])
    growth = stats.propagation[5]
    expected = (growth * length * np.linalg.norm(delta, axis=1)) ** 2 / stats.numel
    assert fit.error == pytest.approx(expected, rel=1e-5)


def test_groups_cached_together_are_unsure_of_one_another() -> None:
    """Where it was not measured, as if all of it pointed one way: (sum of norms)^2."""
    stats = unmeasured(random_stats(3))
    last = stats.num_steps - 1
    computed = np.ones((stats.num_steps, 1 + stats.num_groups), dtype=bool)
    computed[last, [1, 2]] = False
    deltas = stats.deltas[:, last, :2, 0].astype(float)
    sizes = np.linalg.norm(deltas, axis=2)
    length = float(stats.sigmas[last])
    scale = (length * stats.propagation[last]) ** 2 / stats.numel
    both = np.linalg.norm(deltas.sum(axis=1), axis=1) ** 2
    unsure = sizes.sum(axis=1) ** 2 - (sizes**2).sum(axis=1)
    found = ErrorModel(stats, "reuse").fit(computed).error
    assert found == pytest.approx(scale * (both + unsure), rel=1e-5)
    residual = replace(stats, mode="residual")
    found = ErrorModel(residual, "reuse").fit(computed).error
    assert found == pytest.approx(scale * sizes.sum(axis=1) ** 2, rel=1e-5)


class LinearModel:
    """Three groups that add (a_g s + f_g) to a stream s: later ones answer in proportion."""

    gains = (0.3, -0.4, 0.8)

    def __init__(self, steps: int = 12) -> None:
        rng = np.random.default_rng(9)
        self.sigmas = np.linspace(1, 0, steps + 1)
        self.inputs, *self.own = np.cumsum(rng.standard_normal((4, steps, 2, 16)), axis=1)

    def velocity(self, step: int, residuals: dict[int, np.ndarray]) -> tuple[np.ndarray, list]:
        """(P, N), and what each group added; some residuals are given."""
        stream, added = self.inputs[step], []
        for group, gain in enumerate(self.gains):
            own = gain * stream + self.own[group][step]
            added.append(residuals.get(group, own))
            stream = stream + added[-1]
        return stream, added

    def stats(self, lags: int = 6) -> CalibrationStats:
        """Its statistics, by replaying."""
        steps = len(self.sigmas) - 1
        full = [self.velocity(step, {}) for step in range(steps)]

        def delta(step: int, lag: int, *groups: int) -> np.ndarray:
            past = full[step - lag][1]
            return self.velocity(step, {g: past[g] for g in groups})[0] - full[step][0]

        deltas = np.zeros((2, steps, 3, lags, 16))
        for step in range(steps):
            for group in range(3):
                for lag in range(1, min(lags, step) + 1):
                    deltas[:, step, group, lag - 1] = delta(step, lag, group)
        responses = np.zeros((2, steps - 1, 3, 3))
        for step in range(1, steps):
            for couple, (h, g) in enumerate([(0, 1), (0, 2), (1, 2)]):
                first = delta(step, 1, h)
                answer = first + delta(step, 1, g) - delta(step, 1, h, g)
                products = [(answer, first), (answer, answer), (first, first)]
                for column, (left, right) in enumerate(products):
                    responses[:, step - 1, couple, column] = (left * right).sum(axis=1)
        return random_stats(
            prompts=2,
            steps=steps,
            size=16,
            sigmas=self.sigmas,
            velocities=np.stack([v for v, _ in full], axis=1).astype(np.float32),
            deltas=deltas.astype(np.float32),
            responses=responses,
            response_sigmas=self.sigmas[1:-1],
        )


@pytest.mark.parametrize("predictor", ["reuse", "published", "fitted"])
@pytest.mark.parametrize("seed", range(4))
def test_answers_of_groups_are_exact_where_they_are_linear(predictor: str, seed: int) -> None:
    """Oracle: the model run with those cells cached, residuals of cached company among them."""
    linear = LinearModel()
    model = ErrorModel(linear.stats(), predictor)
    computed = random_table(seed, 12, 3, skips=False)
    cells = model.fit(computed).cells
    history: list[list[np.ndarray]] = []
    changes: dict[int, np.ndarray] = {}
    for stretch in model.stretches(computed):
        step = stretch.start
        predicted = {}
        for group, sources in stretch.cells:
            shares = cells[group][step].shares
            assert sum(shares) == pytest.approx(1)
            past = [history[source][group] for source in sources]
            predicted[group] = sum(c * r for c, r in zip(shares, past, strict=False))
        velocity, added = linear.velocity(step, predicted)
        history.append(added)
        found, unsure, changes = model._velocity(step, stretch.cells, changes)
        np.testing.assert_allclose(found, velocity, atol=1e-4)
        assert unsure.max() < 1e-6
    assert not computed[:, 1:].all()


def test_what_is_not_along_a_change_is_a_variance() -> None:
    stats = random_stats(3)
    parts = np.broadcast_to([0.0, 0.25, 1.0], (stats.num_prompts, 1, 3, 3)).copy()
    stats = replace(stats, responses=parts, response_sigmas=np.array([0.5]))
    last = stats.num_steps - 1
    computed = np.ones((stats.num_steps, 1 + stats.num_groups), dtype=bool)
    computed[last, [1, 2]] = False
    first, second = stats.deltas[:, last, :2, 0].astype(float).swapaxes(0, 1)
    squares = ((first + second) ** 2).sum(axis=1) + 0.25 * (first**2).sum(axis=1)
    scale = (float(stats.sigmas[last]) * stats.propagation[last]) ** 2 / stats.numel
    found = ErrorModel(stats, "reuse").fit(computed).error
    assert found == pytest.approx(scale * squares, rel=1e-5)


def test_fitted_taps_are_better_than_none() -> None:
    stats = unmeasured(random_stats(4, steps=16, prompts=6))
    for seed in range(4):
        computed = random_table(seed, 16, 3)
        scores = {name: ErrorModel(stats, name).fit(computed).score for name in ("fitted", "reuse")}
        assert scores["fitted"] < scores["reuse"]


def test_what_was_scored_before_makes_no_difference() -> None:
    """States that schedules share are kept. Oracle: a fresh model for each."""
    stats = random_stats(5, steps=14)
    kept = ErrorModel(stats, quick=True)
    tables = [random_table(seed % 7, 14, 3, skips=bool(seed % 2)) for seed in range(20)]
    for table in tables:
        assert kept.score(table) == ErrorModel(stats, quick=True).score(table)


@pytest.mark.parametrize("groups", [False, True])
def test_quick_scores_order_schedules_as_full_fits_do(groups: bool) -> None:
    stats = random_stats(6, steps=16, prompts=6, size=200)
    quick, full = ErrorModel(stats, quick=True, groups=groups), ErrorModel(stats)
    scores = []
    for seed in range(12):
        table = random_table(seed, 16, 3)
        if not groups:
            table[:] = table[:, :1]
        scores.append((quick.score(table), full.fit(table).score))
    one, other = np.array(scores).T
    assert np.corrcoef(one, other)[0, 1] > 0.8


def test_nothing_is_read_across_a_segment() -> None:
    segments = np.array([0.0] * 6 + [1.0] * 6)
    stats = random_stats(7, segments=segments)
    fit = ErrorModel(stats).fit(skipping(stats, [0, 1, 3, 5, 6, 7, 9, 11]))
    assert fit.taps[6] == ()
    assert [len(fit.taps[step]) for step in (5, 7, 9, 11)] == [3, 1, 2, 3]


def test_an_exact_schedule_has_no_error() -> None:
    stats = random_stats(8)
    everything = np.ones((stats.num_steps, 1 + stats.num_groups), dtype=bool)
    fit = ErrorModel(stats).fit(everything)
    assert fit.score == -np.inf
    assert np.isinf(predicted_psnr(stats, fit.error)).all()
    other: dict[str, Any] = {"setting": {"scheduler": "DPMSolverMultistepScheduler"}}
    fit = ErrorModel(replace(stats, latents=stats.latents**2, **other)).fit(everything)
    assert fit.error == pytest.approx(0, abs=1e-12)


def test_short_vectors_keep_inner_products_and_folded_ones_their_means() -> None:
    rng = np.random.default_rng(9)
    vectors = rng.standard_normal((2, 5, 300))
    found = short(vectors)
    assert found.shape == (2, 5, 5)
    assert found @ found.swapaxes(1, 2) == pytest.approx(vectors @ vectors.swapaxes(1, 2))
    assert fold(vectors, 400) is vectors
    folded = fold(vectors, 64)
    assert folded.shape == (2, 5, 64)
    assert folded.sum(axis=-1) == pytest.approx(vectors.sum(axis=-1))


def test_the_mean_of_logarithms_is_not_decided_by_a_prompt_without_error() -> None:
    assert mean_log10(np.array([1e-2, 1e-4])) == pytest.approx(-3)
    assert mean_log10(np.array([1.0, 0.0])) == pytest.approx(-6)
    assert mean_log10(np.zeros(3)) == -np.inf
