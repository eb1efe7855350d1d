"""Shorter vectors with the same inner products, for searches that score thousands of schedules."""

from __future__ import annotations

import numpy as np

from layercache.stats import FloatArray


def short(vectors: FloatArray) -> FloatArray:
    """(P, V, N') coordinates of vectors (P, V, N) with the same inner products, N' <= V."""
    gram = vectors @ vectors.swapaxes(1, 2)
    square, axes = np.linalg.eigh(gram)
    kept = int((square > 1e-13 * square[:, -1:]).sum(axis=1).max(initial=1))
    result: FloatArray = (axes * np.sqrt(np.maximum(square, 0.0))[:, None])[..., -kept:]
    return result


def fold(sketches: FloatArray, size: int) -> FloatArray:
    """Count-sketches (..., N) as count-sketches of `size` numbers: buckets are added up.

    Inner products stay right in the mean, with more scatter.
    """
    count = sketches.shape[-1]
    if count <= size:
        return sketches
    if spare := -count % size:
        sketches = np.pad(sketches, [(0, 0)] * (sketches.ndim - 1) + [(0, spare)])
    parts = sketches.reshape(*sketches.shape[:-1], -1, size)
    result: FloatArray = parts.sum(axis=-2, dtype=np.float64)
    return result
