"""The table of what caching each group costs."""

from __future__ import annotations

import numpy as np
import pytest

from bench.heterogeneity import heterogeneity
from layercache.calibration import calibrate
from tests.tiny import tiny_arguments, tiny_pipeline


def test_a_group_is_compared_with_skipping_the_step() -> None:
    stats = calibrate(
        tiny_pipeline(),
        ["a red circle"],
        num_inference_steps=4,
        groups=2,
        lags=1,
        probes=0,
        call_kwargs=tiny_arguments(),
        progress=False,
    )
    rows = heterogeneity(stats)
    assert [row["group"] for row in rows] == [group.name for group in stats.groups]
    assert sum(row["share"] for row in rows) <= 1
    skipped = np.square(np.diff(stats.velocities, axis=1)).sum()
    cached = np.square(stats.deltas[:, 1:, 0, 0]).sum()
    assert rows[0]["ratio"] == pytest.approx(cached / skipped)
