"""The command line on a tiny random model: results, exit codes, and one clean line an error."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from layercache.cli import main
from layercache.cli._options import read_prompts
from layercache.plan import Plan
from layercache.reference._text import WordEncoder
from layercache.stats import CalibrationStats
from tests.tiny import tiny_transformer

STEPS = 6


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def succeeded(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def failed(code: int, *arguments: object) -> str:
    """Run a command that must fail with `code`; its last line on stderr, without "Error: "."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    *logged, error = result.stderr.splitlines()
    assert error.startswith("Error: ") and set(logged) <= {"the reference model on cpu"}
    return error.removeprefix("Error: ")


def weights_of(folder: Path, blocks: int) -> Path:
    tiny_transformer(blocks).save_pretrained(folder / "transformer")
    WordEncoder().save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights_of(tmp_path_factory.mktemp("weights"), blocks=4)


def calibrate(weights: Path, out: Path, *more: object) -> Result:
    options = ("--steps", STEPS, "--groups", 2, "--lags", 3, "--out", out)
    return succeeded("calibrate", "--weights", weights, *options, *more)


@pytest.fixture(scope="module")
def stats_file(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stats") / "stats.npz"
    calibrate(weights, out, "--count", 3)
    return out


@pytest.fixture(scope="module")
def plan_file(stats_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plan") / "plan.json"
    succeeded("compile", stats_file, "--budget", "0.7", "--out", out)
    return out


def test_help_names_every_command() -> None:
    text = succeeded("--help").stdout
    commands = "demo calibrate merge compile refine inspect check eval"
    for name in commands.split():
        assert name in text
        assert "--json" in succeeded(name, "--help").stdout


def test_the_module_runs_as_the_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "layercache", "inspect", "nowhere.json"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr == "Error: nowhere.json: no such plan file\n"


def test_calibrate_writes_statistics_and_prints_only_json(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.npz"
    result = calibrate(weights, out, "--count", 2, "--json")
    data = json.loads(result.stdout)
    assert data["prompts"] == 2 and data["steps"] == STEPS
    assert data["groups"] == ["transformer_blocks[0:2]", "transformer_blocks[2:4]"]
    assert CalibrationStats.load(out).num_prompts == 2


def test_calibrate_reads_prompts_from_a_file(weights: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n\n  a blue square \na green star\n")
    out = tmp_path / "s.npz"
    data = json.loads(calibrate(weights, out, "--prompts", file, "--count", 2, "--json").stdout)
    assert data["prompts"] == 2


def test_calibrate_states_time_and_memory_first_and_tidies_up(
    weights: Path, tmp_path: Path
) -> None:
    result = calibrate(weights, tmp_path / "s.npz", "--count", 1, "--mode", "residual")
    assert "calibration of 1 prompts, residual mode: about" in result.stderr
    assert "above the model" in result.stderr
    assert result.stdout.startswith("CalibrationStats of QwenImage") and "residual" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]


def test_statistics_go_to_stdout_alone(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = calibrate(weights, Path("-"), "--count", 1, "--mode", "residual")
    Path("read.npz").write_bytes(result.stdout_bytes)
    assert CalibrationStats.load("read.npz").num_prompts == 1
    assert [path.name for path in tmp_path.iterdir()] == ["read.npz"]


def test_shards_are_merged_from_their_folder(weights: Path, tmp_path: Path) -> None:
    out, parts = tmp_path / "s.npz", tmp_path / "s.npz.parts"
    for index in range(2):
        calibrate(weights, out, "--count", 3, "--shard", f"{index}/2")
        assert not out.exists()
    assert len(list(parts.iterdir())) == 3
    data = json.loads(succeeded("merge", parts, "--out", out, "--json").stdout)
    assert data["prompts"] == 3 and data["mode"] == "replay"


def test_what_a_broken_off_run_measured_is_used(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.npz"
    calibrate(weights, out, "--count", 3, "--shard", "0/3")
    result = calibrate(weights, out, "--count", 3)
    assert "resuming: 1 prompts are in" in result.stderr
    assert CalibrationStats.load(out).num_prompts == 3
    assert not (tmp_path / "s.npz.parts").exists()


def test_a_folder_of_another_run_is_a_mismatch_that_names_the_field(
    weights: Path, tmp_path: Path
) -> None:
    parts = tmp_path / "parts"
    calibrate(weights, tmp_path / "s.npz", "--count", 1, "--parts", parts)
    assert len(list(parts.iterdir())) == 1, "a folder that was asked for is kept"
    message = failed(
        3, "calibrate", "--weights", weights, "--steps", STEPS, "--groups", 2, "--lags", 2,
        "--count", 2, "--parts", parts, "--out", tmp_path / "t.npz",
    )  # fmt: skip
    assert "lags differs (2 and 3)" in message


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("blocks", ["[0:1]", "[1:2]", "[2:3]", "[3:4]"]),
        ("0:1,1:4", ["[0:1]", "[1:4]"]),
        ("auto:2", None),
    ],
)
def test_groups_are_given_as_text(
    weights: Path, tmp_path: Path, groups: str, expected: list[str] | None
) -> None:
    result = calibrate(
        weights, tmp_path / "s.npz", "--count", 1, "--lags", 1, "--groups", groups, "--json"
    )
    names = json.loads(result.stdout)["groups"]
    if expected is None:
        assert len(names) == 2
        assert f"groups: {','.join(names)}" in result.stderr
    else:
        assert names == [f"transformer_blocks{bounds}" for bounds in expected]


@pytest.mark.parametrize(
    "option",
    [("--shard", "2/2"), ("--shard", "one"), ("--max-memory", "much"), ("--mode", "fast")],
)
def test_calibrate_options_that_cannot_be_read(option: tuple[str, str]) -> None:
    assert run("calibrate", *option).exit_code == 2


def test_a_bound_on_memory_that_is_too_small_is_refused(weights: Path, tmp_path: Path) -> None:
    message = failed(
        1, "calibrate", "--weights", weights, "--steps", 2, "--count", 1, "--max-memory", "1 kB",
        "--out", tmp_path / "s.npz",
    )  # fmt: skip
    assert "calibration needs at least" in message and "max_memory=1000 bytes" in message


def test_calibrate_with_an_unknown_word_says_which(weights: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red cirkle\n")
    message = failed(1, "calibrate", "--weights", weights, "--prompts", file, "--steps", 2)
    assert "does not know the word 'cirkle'" in message and "'circle'" in message


def test_prompts_in_another_encoding_are_refused(weights: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("ein roter Kreis für mich".encode("latin-1"))
    result = run("calibrate", "--weights", weights, "--prompts", file)
    assert result.exit_code == 2 and "is no UTF-8 text" in result.stderr
    file.write_bytes(b"\xef\xbb\xbfa red circle\r\n\r\n")
    assert read_prompts(file, "reference", "calibration", 8, limit=None) == ["a red circle"]


def test_another_model_needs_prompts() -> None:
    result = run("calibrate", "--pipe", "some/model")
    assert result.exit_code == 2
    assert "--prompts is needed for every model but the reference one" in result.stderr


def test_a_pipeline_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    message = failed(1, "check", "--pipe", tmp_path / "none", _write_plan(tmp_path))
    assert message.startswith("cannot load the pipeline") and "model_index.json" in message


def test_merge_joins_and_refuses_the_same_prompts_twice(
    weights: Path, stats_file: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "more.txt"
    prompts.write_text("a red circle\n")
    other, out = tmp_path / "other.npz", tmp_path / "all.npz"
    calibrate(weights, other, "--prompts", prompts)
    data = json.loads(succeeded("merge", stats_file, other, "--out", out, "--json").stdout)
    assert data["prompts"] == 4
    assert "3 prompts stand in more than one part" in failed(
        1, "merge", stats_file, stats_file, "--out", out
    )


def test_merge_of_another_model_is_a_mismatch(stats_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.npz"
    calibrate(weights_of(tmp_path / "w", blocks=6), other, "--count", 1)
    assert "cannot merge statistics" in failed(3, "merge", stats_file, other, "--out", other)


def test_compile_prints_the_plan_and_keeps_the_budget(stats_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    result = succeeded("compile", stats_file, "--budget", "0.6", "--out", out)
    plan = Plan.load(out)
    assert plan.predicted.compute_share <= 0.6
    assert result.stdout.rstrip() == plan.summary()
    data = json.loads(
        succeeded("compile", stats_file, "--budget", ".6", "--out", out, "--json").stdout
    )
    assert Plan.from_dict(data["plan"]) == plan


def test_compile_passes_its_options_on(stats_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    options = ("--solver", "greedy", "--units", "groups", "--predictor", "published")
    succeeded("compile", stats_file, "--budget", "0.8", *options, "--out", out)
    plan = Plan.load(out)
    assert plan.certificate.solver == "greedy" and plan.step_unit is None


@pytest.mark.parametrize("budget", ["fast", "150%", "-1", "0.5x", "nanx"])
def test_a_budget_that_cannot_be_read_is_wrong_usage(stats_file: Path, budget: str) -> None:
    result = run("compile", stats_file, "--budget", budget)
    assert result.exit_code == 2
    assert f"budget {budget!r} cannot be read: give a share in (0, 1]" in result.stderr


def test_a_budget_that_cannot_be_met_says_what_can(stats_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    message = failed(1, "compile", stats_file, "--budget", "0.001", "--out", out)
    assert "budget" in message and not out.exists()


def test_inspect_tells_plans_from_statistics(stats_file: Path, plan_file: Path) -> None:
    assert succeeded("inspect", plan_file).stdout.startswith("Plan for QwenImageTransformer2DModel")
    assert succeeded("inspect", stats_file).stdout.startswith("CalibrationStats of QwenImage")
    assert "plan" in json.loads(succeeded("inspect", plan_file, "--json").stdout)
    assert "group_ms" in json.loads(succeeded("inspect", stats_file, "--json").stdout)


def test_a_truncated_plan_is_one_line(plan_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_bytes(plan_file.read_bytes()[:-40])
    assert "not a whole plan file" in failed(1, "inspect", broken)


def test_truncated_statistics_are_one_line(stats_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.npz"
    broken.write_bytes(stats_file.read_bytes()[:-400])
    assert "not a whole statistics file" in failed(1, "inspect", broken)


def test_statistics_with_nan_are_refused(stats_file: Path, tmp_path: Path) -> None:
    with np.load(stats_file) as archive:
        members: dict[str, Any] = dict(archive)
    members["velocities"] = members["velocities"].copy()
    members["velocities"][0, 0, 0] = np.nan
    broken = tmp_path / "nan.npz"
    np.savez(broken, **members)
    message = failed(1, "compile", broken, "--budget", "0.5", "--out", tmp_path / "p.json")
    assert "velocities holds NaN or infinity: the calibration run overflowed" in message


def test_refine_writes_a_plan_that_tells_what_was_measured(
    weights: Path, stats_file: Path, tmp_path: Path
) -> None:
    compiled, out = tmp_path / "compiled.json", tmp_path / "refined.json"
    units = ("--units", "step", "--out", compiled)
    succeeded("compile", stats_file, "--budget", "0.7", *units)
    model = ("--weights", weights, "--count", 3, "--stats", stats_file)
    result = succeeded("refine", compiled, *model, "--out", out, "--json")
    plan = Plan.load(out)
    assert json.loads(result.stdout)["plan"] == plan.to_dict()
    assert plan.run_steps == Plan.load(compiled).run_steps
    assert plan.provenance["refined"]["prompts"] == 3
    assert "refined on 3 prompts" in result.stderr


def test_check_accepts_the_model_and_its_statistics(
    weights: Path, stats_file: Path, plan_file: Path
) -> None:
    result = succeeded("check", plan_file, "--weights", weights, "--json")
    assert json.loads(result.stdout) == {"fits": True, "warnings": []}
    assert "fits QwenImage" in succeeded("check", plan_file, "--stats", stats_file).stdout


def test_check_warns_of_another_setting(weights: Path, plan_file: Path) -> None:
    call = '{"true_cfg_scale": 2.0}'
    result = succeeded("check", plan_file, "--weights", weights, "--call", call)
    assert "warning: true_cfg_scale is 4.0 in the plan and 2.0 here" in result.stdout


def test_check_refuses_another_model(plan_file: Path, tmp_path: Path) -> None:
    message = failed(3, "check", plan_file, "--weights", weights_of(tmp_path, blocks=6))
    assert "this plan is for another model" in message


def test_eval_measures_the_plan_beside_the_controls(
    weights: Path, plan_file: Path, tmp_path: Path
) -> None:
    arguments = ("eval", plan_file, "--weights", weights, "--count", 2, "--out", tmp_path)
    data = json.loads(succeeded(*arguments, "--json").stdout)
    assert [row["method"] for row in data["rows"]] == ["layercache", "uniform", "fewer-steps"]
    assert data["gate_failures"] == []
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == data["rows"]
    assert (tmp_path / "report.html").exists()


def test_eval_fails_with_four_when_a_gate_fails(weights: Path, plan_file: Path) -> None:
    base = ("eval", plan_file, "--weights", weights, "--count", 1)
    assert run(*base, "--min-psnr", 1).exit_code == 0
    result = run(*base, "--min-psnr", 119, "--min-speedup", 99)
    assert result.exit_code == 4
    assert "mean PSNR is " in result.stderr and "below the gate of 119.00 dB" in result.stderr
    assert "below the gate of 99.00x" in result.stderr
    assert "fewer-steps" in result.stdout, "the table is printed all the same"


def test_eval_of_a_plan_for_another_model_is_a_mismatch(plan_file: Path, tmp_path: Path) -> None:
    other = weights_of(tmp_path, blocks=6)
    assert "another model" in failed(3, "eval", plan_file, "--weights", other, "--count", 1)


def test_wrong_usage_is_exit_code_two() -> None:
    assert run("compile").exit_code == 2
    assert run("nonsense").exit_code == 2
    assert run("calibrate", "--call", "[1]").exit_code == 2


def test_demo_does_the_whole_job(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = importlib.import_module("layercache.evaluation.demo")
    measured = module.calibrate

    def steady(*arguments: Any, **options: Any) -> CalibrationStats:
        # Of so small a model a busy machine measures times under which a budget of 1/3 is none.
        stats: CalibrationStats = measured(*arguments, **options)
        times = [[2.0] * stats.num_groups + [0.5, 1.0]] * stats.num_prompts
        return replace(stats, times_ms=np.array(times))

    monkeypatch.setattr(module, "calibrate", steady)
    out = tmp_path / "out"
    result = succeeded("demo", "--out", out, "--weights", weights)
    results = json.loads((out / "results.json").read_text())
    methods = {"layercache", "layercache-published", "meancache", "uniform", "fewer-steps"}
    assert {row["method"] for row in results["rows"]} == methods
    assert {row["target_speedup"] for row in results["rows"]} == {1.37, 2.0, 3.0}
    assert len(results["rows"]) == 15
    for row in results["rows"]:
        assert row["compute_share"] <= 1 / row["target_speedup"] + 1e-9
        assert row["method"] in result.stdout
    names = {path.name for path in out.iterdir()}
    plans = {"plan-1.37x.json", "plan-2x.json", "plan-3x.json"}
    pictures = {"sheet.png", "plan.png", "pareto.png"}
    assert names == plans | pictures | {"stats.npz", "results.json", "report.html"}
    for name in plans:
        Plan.load(out / name)


def _write_plan(folder: Path) -> Path:
    from tests.test_plan_format import example

    path = folder / "example.json"
    Plan.from_dict(example()).save(path)
    return path
