"""Prompts split over shards and processes: the same statistics whatever the split."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from layercache.calibration.sharding import Processes, take_shard
from layercache.errors import StatsError
from layercache.stats import CalibrationStats, merge_all
from tests.calibration.test_parts import same_statistics
from tests.calibration.worker import PROMPTS, calibrate_tiny

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("count", [2, 3])
def test_shards_merge_to_the_statistics_of_one_run(
    tmp_path: Path, batch_size: int, count: int
) -> None:
    whole = calibrate_tiny(None, batch_size=batch_size)
    parts = [
        calibrate_tiny(tmp_path, batch_size=batch_size, shard=(index, count))
        for index in range(count)
    ]
    assert sum(part.num_prompts for part in parts) == len(PROMPTS)
    same_statistics(merge_all(parts[::-1]), whole)
    same_statistics(merge_all([CalibrationStats.load(p) for p in tmp_path.glob("*.npz")]), whole)


def test_shards_are_disjoint_and_leave_nothing_out() -> None:
    items = list(range(11))
    for count in range(1, 12):
        taken = [take_shard(items, (index, count)) for index in range(count)]
        assert sorted(item for part in taken for item in part) == items
        assert max(map(len, taken)) - min(map(len, taken)) <= 1


def test_processes_share_fewer_batches_than_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes(on_cpu=True)
    for count in (1, 3, 8):
        shares = []
        for rank in range(4):
            state = SimpleNamespace(process_index=rank, num_processes=4)
            monkeypatch.setattr(processes, "_state", state)
            shares.append(processes.split(list(range(count))))
        assert sorted(item for share in shares for item in share) == list(range(count))


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ((2, 2), "shard 2/2: the first number must be from 0 to 1"),
        ((-1, 2), "shard -1/2"),
        ((0, 0), "shard 0/0: the second number must be at least 1"),
        ((3, 4), "shard 3/4 is empty: there are 3 batches of prompts"),
    ],
)
def test_impossible_shards_are_refused(shard: tuple[int, int], message: str) -> None:
    with pytest.raises(StatsError, match=message):
        take_shard("abc", shard)


@pytest.mark.slow
def test_two_gloo_processes_return_the_statistics_of_one(tmp_path: Path) -> None:
    """As `torchrun --nproc-per-node 2`, on the CPU; both processes get all prompts."""
    launcher = ["torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m"]
    for launch, folder in (([], "one"), (launcher, "two")):
        (tmp_path / folder).mkdir()
        worker = ["tests.calibration.worker", str(tmp_path / folder), "3"]
        result = subprocess.run(
            [sys.executable, "-m", *launch, *worker],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            timeout=300,
        )
        assert result.returncode == 0, result.stderr[-3000:]
    whole = CalibrationStats.load(tmp_path / "one" / "main.npz")
    assert whole.num_prompts == len(PROMPTS)
    for name in ("main.npz", "other.npz"):
        same_statistics(CalibrationStats.load(tmp_path / "two" / name), whole)
