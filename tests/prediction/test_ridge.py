"""Ridge fits. Oracles: coefficients that are known, and each prompt left out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from layercache.prediction.ridge import RIDGES, LeastSquares, fit_row, quick_fit


def parts(seed: int = 0, prompts: int = 5, taps: int = 3, size: int = 20) -> tuple[np.ndarray, ...]:
    """An error under a prior, and moves."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((prompts, size)), rng.standard_normal((taps, prompts, size))


def test_what_is_exact_is_found_exactly() -> None:
    _, moves = parts()
    prior, true = np.array([0.5, 0.0, 0.0]), np.array([0.9, -0.4, 0.2])
    rest = np.tensordot(prior - true, moves, axes=1)
    squares = LeastSquares.of(rest, moves, prior, np.ones(5))
    assert squares.fit() == pytest.approx(true, abs=1e-4)
    assert quick_fit(rest, moves, prior) == pytest.approx(true, abs=2e-2)


def test_each_prompt_is_left_out_of_its_own_fit() -> None:
    """Oracle: the normal equations of all other prompts, one prompt at a time."""
    rest, moves = parts(1)
    squares = LeastSquares.of(rest, moves, np.zeros(3), np.ones(5))
    weights = np.random.default_rng(2).random(5) + 0.1
    ridge = RIDGES[3]
    found = squares.solve((1 - np.eye(5)) * weights, ridge)
    for left in range(5):
        others = [p for p in range(5) if p != left]
        share = weights[others] / weights[others].sum()
        normal = sum(w * moves[:, p] @ moves[:, p].T for w, p in zip(share, others, strict=True))
        right = sum(w * moves[:, p] @ rest[p] for w, p in zip(share, others, strict=True))
        system = normal + ridge * np.diag(np.diag(normal))
        assert found[left] == pytest.approx(-np.linalg.solve(system, right))
        error = rest[left] + found[left] @ moves[:, left]
        assert squares.left(found)[left] == pytest.approx(float(error @ error))


def test_the_prior_stands_where_a_fit_does_no_good_on_prompts_left_out() -> None:
    rest, moves = parts(3, prompts=4, taps=3, size=200)
    prior = np.array([1.0, 2.0, 3.0])
    # Nothing of the error lies along any move, so that whatever is fitted is noise.
    for p in range(4):
        basis, _ = np.linalg.qr(moves[:, p].T)
        rest[p] -= basis @ (basis.T @ rest[p])
    assert LeastSquares.of(rest, moves, prior, np.ones(4)).fit() == pytest.approx(prior, abs=1e-12)


def test_moves_that_stand_still_keep_their_prior() -> None:
    rest, moves = parts(4)
    moves[:] *= 1e-12
    squares = LeastSquares.of(rest, moves, np.array([0.5, 0.1, 0.0]), np.full(5, 1.0))
    assert np.abs(squares.fit() - squares.prior).max() < 1e-2
    still = quick_fit(rest, 0 * moves, squares.prior)
    assert still == pytest.approx(squares.prior)


def test_one_loud_prompt_does_not_decide() -> None:
    """Its error cannot be made small, so that the others' fit is what counts."""
    rest, moves = parts(5, prompts=6)
    true = np.array([0.3, -0.2, 0.1])
    rest[:] = -np.tensordot(true, moves, axes=1)
    rest[0] = 1e3 * np.random.default_rng(6).standard_normal(rest.shape[1])
    found = LeastSquares.of(rest, moves, np.zeros(3), np.ones(6)).fit()
    assert found == pytest.approx(true, abs=0.02)


def test_a_row_is_fitted_to_its_target() -> None:
    rng = np.random.default_rng(7)
    basis = rng.standard_normal((4, 2, 30))
    target = 0.7 * basis[:, 0] - 0.3 * basis[:, 1]
    assert fit_row(basis, target, np.array([0.5, 0.0])) == pytest.approx([0.7, -0.3], abs=1e-4)
