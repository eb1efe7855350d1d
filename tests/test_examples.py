"""Examples run, at tiny size, and show what they say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_a_plan_for_trajectories(capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(EXAMPLES / "trajectories.py"))["main"]
    found = main(["--steps", "16", "--calls", "8", "--train-steps", "200", "--paths", "4"])
    ((plan, fewer),) = found.values()
    assert list(found) == [8]
    assert plan < fewer / 3
    assert "plan, 8 of 16 steps" in capsys.readouterr().out
