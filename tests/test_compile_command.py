"""`layercache compile`: budgets, retargeting, files and mistakes."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from layercache.cli import _compiling as compiling
from layercache.cli import main
from layercache.compile import pareto
from layercache.options import Options
from layercache.plan import Plan
from layercache.stats import CalibrationStats
from tests.prediction.strategies import random_stats

SETTING = {
    "scheduler_shift": 3.0,
    "scheduler_use_dynamic_shifting": False,
    "width": 512,
    "height": 512,
    "latent_shape": [4, 64, 64],
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["compile", *map(str, arguments)])


@pytest.fixture
def stats() -> CalibrationStats:
    return random_stats(0, steps=12, setting=SETTING)


@pytest.fixture
def file(stats: CalibrationStats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    stats.save(tmp_path / "stats.npz")
    return tmp_path / "stats.npz"


def test_several_budgets_are_several_files(file: Path, stats: CalibrationStats) -> None:
    budgets = ["1.37x", "2", "50%", "40dB@10%"]
    options = [word for budget in budgets for word in ("--budget", budget)]
    result = run(file, *options, "--units", "step")
    assert result.exit_code == 0, result.output
    names = ["plan-1.37x.json", "plan-2x.json", "plan-0.5.json", "plan-40dB@10%.json"]
    plans = pareto(stats, budgets, Options(units="step"))
    assert [Plan.load(name) for name in names] == plans
    assert result.stdout == "".join(plan.summary() + "\n" for plan in plans)
    # No bar where nobody watches.
    assert result.stderr == "".join(f"wrote {name}\n" for name in names)


def test_the_budget_stands_where_the_name_says(file: Path) -> None:
    assert run(file, "--budget", "0.6", "--out", "p-{budget}.json").exit_code == 0
    assert Path("p-0.6.json").is_file()
    assert run(file, "--budget", "0.6").exit_code == 0
    assert Path("plan.json").is_file()
    # The same budget in two forms is one.
    result = run(file, "--budget", "2", "--budget", "2.0x", "--out", "two.json", "--json")
    assert json.loads(result.stdout)["file"] == "two.json"
    result = run(file, "--budget", "2", "--budget", "0.6", "--json")
    assert [made["file"] for made in json.loads(result.stdout)["plans"]] == [
        "plan-2x.json",
        "plan-0.6.json",
    ]


def test_nothing_is_written_unless_all_budgets_are_met(file: Path) -> None:
    result = run(file, "--budget", "0.6", "--budget", "0.001")
    assert result.exit_code == 1 and "cannot be met" in result.stderr
    assert not list(file.parent.glob("*.json"))


def test_steps_shift_and_size_are_compiled_for(file: Path) -> None:
    u = np.linspace(1, 1 / 9, 9)
    assert run(file, "--budget", "0.6", "--steps", 9, "--shift", 2).exit_code == 0
    plan = Plan.load("plan.json")
    assert plan.sigmas == pytest.approx([*(2 * u / (1 + u)), 0.0])
    assert "scheduler_shift" not in plan.setting
    assert run(file, "--budget", "0.6", "--size", "256x512").exit_code == 0
    plan = Plan.load("plan.json")
    assert plan.num_steps == 12
    assert plan.setting["latent_shape"] == [4, 64, 32]
    assert plan.setting["calibrated_pixels"] == [512, 512]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--budget", "2", "--budget", "3", "--out", "p.json"], 2, "{budget}"),
        (["--budget", "0.6", "--steps", "9", "--sigmas", "1,0.5,0"], 2, "--sigmas"),
        (["--budget", "0.6", "--shift", "2", "--size", "8x8"], 2, "--shift or --size"),
        (["--budget", "0.6", "--size", "512"], 2, "1328x800"),
        (["--budget", "0.6", "--size", "0x512"], 2, "1328x800"),
        (["--budget", "0.6", "--steps", "0"], 2, "--steps"),
        (["--budget", "0.6", "--shift", "0"], 2, "--shift"),
        (["--budget", "0.6", "--forced", "a"], 2, "no list of numbers"),
        (["--budget", "0.6", "--sigmas", "1;0"], 2, "no list of numbers"),
        (["--budget", "0.6", "--forced", "0.5"], 2, "whole number"),
        (["--budget", "0.6", "--units", "blocks"], 2, "blocks"),
        (["--budget", "40dB@200%"], 2, "40dB@10%"),
        ([], 2, "--budget"),
    ],
)
def test_mistakes_are_told(file: Path, arguments: list[str], code: int, message: str) -> None:
    result = run(file, *arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert not list(file.parent.glob("*.json"))


def test_unknown_levels_are_asked_for(file: Path, stats: CalibrationStats) -> None:
    replace(stats, sigmas=np.linspace(1, 0, 13) ** 2).save(file)
    result = run(file, "--budget", "0.6", "--steps", 9)
    assert result.exit_code == 1 and "--sigmas" in result.stderr


def test_every_option_has_a_flag() -> None:
    flags = {param.name for param in compiling.compile_command.params}
    assert {field.name for field in fields(Options)} <= flags
    assert "asked" in inspect.signature(compiling.compile_command.callback).parameters
