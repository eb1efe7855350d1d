"""Mistakes on the command line: each is told in one or two lines, with the documented exit code."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from layercache import Plan, PlanSet
from layercache.cli import main
from layercache.cli._needs import COMMANDS, EXTRAS, OPTIONS
from tests.prediction.strategies import random_stats
from tests.test_cli import weights_of
from tests.test_plan_format import example

CORPUS = Path(__file__).parent.parent / "plans" / "corpus" / "malformed"
OK, FAILED, USAGE, MISMATCH, GATE, INTERRUPTED = 0, 1, 2, 3, 4, 130
TINY = "--weights W --steps 3 --count 1 --lags 1 --groups 2 --mode residual --out made.npz"
MISTAKES: list[tuple[int, str, str]] = [
    # code, what was typed, a word that the answer holds
    (USAGE, "nonsense", "nonsense"),
    (USAGE, "compil stats.npz", "compile"),
    (USAGE, "--nonsense", "--nonsense"),
    (USAGE, "inspect", "FILE"),
    (USAGE, "inspect folder", "folder"),
    (USAGE, "inspect plan.json more", "more"),
    (USAGE, "inspect plan.json --jsn", "--json"),
    (FAILED, "inspect nowhere.json", "nowhere.json"),
    (FAILED, "inspect text.npz", "text.npz"),
    (FAILED, "inspect cut.npz", "cut.npz"),
    (USAGE, "compile", "STATS_FILE"),
    (USAGE, "compile stats.npz", "--budget"),
    (USAGE, "compile stats.npz --budget fast", "1.37x"),
    (USAGE, "compile stats.npz --budget 0", "1.37x"),
    (USAGE, "compile stats.npz --budget nan", "1.37x"),
    (USAGE, "compile stats.npz --budget 0.7 --solver magic", "greedy"),
    (USAGE, "compile stats.npz --budget 0.7 --forced a", "--forced"),
    (USAGE, "compile stats.npz --budget 0.7 --sigmas x", "--sigmas"),
    (USAGE, "compile stats.npz --budget 0.7 --max-gap -1", "--max-gap"),
    (USAGE, "compile stats.npz --budget 0.7 --out folder", "folder"),
    (USAGE, "compile stats.npz --budget 0.7 --out ''", "--out"),
    (USAGE, "compile stats.npz --budget 0.7 --out empty.txt/plan.json", "empty.txt"),
    (USAGE, "compile stats.npz --budget 0.7 --out - --json", "stdout"),
    (FAILED, "compile nowhere.npz --budget 2x", "nowhere.npz"),
    (USAGE, "compile plan.json --budget 2x", "plan.json is a plan"),
    (FAILED, "compile stats.npz --budget 900x", "tightest"),
    (USAGE, "compile stats.npz --budget 0.7 --budget 0.5 --out plan.json", "{budget}"),
    (USAGE, "compile stats.npz --budget 150%", "73%"),
    (USAGE, "compile stats.npz --budget 40dB@110%", "40dB@10%"),
    (USAGE, "compile stats.npz --budget 2x --size big", "1328x800"),
    (USAGE, "compile stats.npz --budget 2x --size 64x64 --shift 3", "--shift"),
    (USAGE, "compile stats.npz --budget 2x --steps 4 --sigmas 1,0.5,0", "--sigmas"),
    (USAGE, "compile stats.npz --budget 0.7 --units blocks", "groups"),
    (USAGE, "compile stats.npz --budget 0.7 --forced 999", "999"),
    (FAILED, "compile stats.npz --budget 0.7 --sigmas 0,1", "sigmas"),
    (USAGE, "merge", "FILES"),
    (USAGE, "merge empty", "empty"),
    (FAILED, "merge nowhere.npz", "nowhere.npz"),
    (FAILED, "merge stats.npz stats.npz", "once"),
    (MISMATCH, "merge stats.npz other.npz", "differs"),
    (USAGE, "bundle", "PLAN_FILES"),
    (USAGE, "bundle stats.npz", "stats.npz is statistics"),
    (FAILED, "explore nowhere.npz", "nowhere.npz"),
    (FAILED, "explore stats.npz --evaluation empty", "eval --out"),
    (USAGE, "explore stats.npz --evaluation empty.txt", "empty.txt"),
    (USAGE, "explore stats.npz --out folder", "folder"),
    (USAGE, "push plan.json", "REPOSITORY"),
    (FAILED, "push nowhere.json me/model", "nowhere.json"),
    (FAILED, "push plan.json 'no name'", "no name"),
    (FAILED, "check nowhere.json", "nowhere.json"),
    (MISMATCH, "check plan.json --stats stats.npz", "another model"),
    (MISMATCH, "check plan.json --weights W", "another model"),
    (USAGE, "check plan.json --weights W --device qpu", "qpu"),
    (USAGE, "check plan.json --weights W --dtype int8", "bfloat16"),
    (USAGE, "check plan.json --weights W --call {", "JSON"),
    (USAGE, "check plan.json --weights W --call [1]", "height"),
    (USAGE, """check plan.json --weights W --call '{"hieght": 32}'""", "height"),
    (USAGE, """check plan.json --weights W --call '{"prompt": "\\ud800"}'""", "Unicode"),
    (USAGE, "calibrate some/model", "--prompts"),
    (USAGE, f"calibrate {TINY} --prompts empty.txt", "one a line"),
    (USAGE, f"calibrate {TINY} --prompts folder", "folder"),
    (FAILED, f"calibrate {TINY} --prompts nowhere.txt", "nowhere.txt"),
    (USAGE, f"calibrate {TINY} --groups x", "blocks"),
    (FAILED, f"calibrate {TINY} --groups 9", "1 to 4"),
    (USAGE, f"calibrate {TINY} --steps 0", "--steps"),
    (USAGE, f"calibrate {TINY} --mode fast", "residual"),
    (USAGE, f"calibrate {TINY} --max-memory much", "12GB"),
    (USAGE, f"calibrate {TINY} --shard 2/2", "--shard"),
    (USAGE, f"calibrate {TINY} --out folder", "folder"),
    (FAILED, f"calibrate {TINY} --component transformer_2", "transformer_2"),
    (USAGE, f"""calibrate {TINY} --call '{{"num_inference_steps": 7}}'""", "--steps"),
    (USAGE, f"""calibrate {TINY} --call '{{"height": "tall"}}'""", "int"),
    (USAGE, f"""calibrate {TINY} --call '{{"latents": [1]}}'""", "Python"),
    (USAGE, f"""calibrate {TINY} --call '{{"callback_on_step_end": 1}}'""", "Python"),
    (USAGE, f"""calibrate {TINY} --call '{{"prompt": "a"}}'""", "--prompts"),
    (USAGE, f"""calibrate {TINY} --call '{{"generator": 1}}'""", "--seed"),
    (USAGE, f"""calibrate {TINY} --call '{{"prompt_2": "a"}}'""", "prompt"),
    (USAGE, f"calibrate {TINY} --scheduler FluxPipeline", "Scheduler"),
    (USAGE, f"calibrate {TINY} --device meta", "meta"),
    (FAILED, "calibrate ./nowhere --prompts prompts.txt", "nowhere"),
    (FAILED, "calibrate notmodel --prompts prompts.txt", "diffusers"),
    (FAILED, "calibrate empty --prompts prompts.txt", "model_index.json"),
    (FAILED, "calibrate a/b/c --prompts prompts.txt", "hub"),
    (FAILED, "calibrate nobody/nothing --prompts prompts.txt", "nobody/nothing"),
    (USAGE, "refine plan.json", "--stats"),
    (FAILED, "refine nowhere.json --stats stats.npz", "nowhere.json"),
    (USAGE, "refine plan.json --stats stats.npz --count 1", "--count"),
    (USAGE, "eval plan.json --weights W --out -", "folder"),
    (USAGE, "eval plan.json --weights W --out empty.txt", "empty.txt"),
    (USAGE, "eval plan.json --weights W --min-psnr high", "--min-psnr"),
    (FAILED, "eval nowhere.json --weights W", "nowhere.json"),
    (MISMATCH, "eval plan.json --weights W --count 1", "another model"),
    (USAGE, "demo --out empty.txt", "empty.txt"),
    # files of another kind, and arguments that changed places
    (USAGE, "inspect notmodel", "directory"),
    (FAILED, "inspect notmodel/model_index.json", "no schema_version"),
    (FAILED, "inspect prompts.txt", "prompts.txt"),
    (FAILED, "inspect -", "-: no such"),
    (USAGE, "compile bundled.json --budget 2x", "is a set of plans"),
    (FAILED, "compile prompts.txt --budget 2x", "prompts.txt"),
    (USAGE, "compile stats.npz 2x", "--budget"),
    (USAGE, "merge stats.npz plan.json", "plan.json is a plan"),
    (USAGE, "bundle plan.json bundled.json", "is a set of plans"),
    (FAILED, "bundle plan.json plan.json", "plans[1] is plans[0] again"),
    (USAGE, "explore plan.json", "plan.json is a plan"),
    (FAILED, "explore stats.npz --evaluation nowhere", "results.json"),
    (USAGE, "export stats.npz --cache-dit mask.json", "is statistics"),
    (FAILED, "export plan.json a/b/c --scheduler made", "no such folder"),
    (USAGE, "push me/model plan.json", "file plan.json"),
    (USAGE, "push stats.npz me/model", "is statistics"),
    (FAILED, "push plan.json https://hub/me/model", "https://hub/me/model"),
    (USAGE, "check stats.npz plan.json", "is statistics"),
    (USAGE, "check bundled.json --weights W", "is a set of plans"),
    (FAILED, "check plan.json text.npz", "one file"),
    (USAGE, "check plan.json --stats plan.json", "plan.json is a plan"),
    (USAGE, "eval stats.npz --weights W", "is statistics"),
    (USAGE, "refine stats.npz --stats stats.npz", "is statistics"),
    (USAGE, "trial plan.json --budget 2x", "plan.json is a plan"),
    (USAGE, "trial stats.npz --budget 2x --budget 3x", "--budget"),
    # budgets
    (USAGE, "compile stats.npz --budget 73", "73%"),
    (USAGE, "compile stats.npz --budget 1,37x", "1.37x"),
    (USAGE, "compile stats.npz --budget -2x", "1.37x"),
    (USAGE, "compile stats.npz --budget 0.5x", "at least 1"),
    (USAGE, "compile stats.npz --budget 900dB", "40dB"),
    (USAGE, "compile stats.npz --budget 2x --max-cache-bytes lots", "12GB"),
    (USAGE, "compile stats.npz --budget 2x --steps 99999", "10000"),
    # prompts, and how many
    (USAGE, f"calibrate {TINY} --prompts latin.txt", "UTF-8"),
    (USAGE, f"calibrate {TINY} --prompts list.json", "one prompt a line"),
    (USAGE, f"calibrate {TINY} --prompts plan.json", "one prompt a line"),
    (USAGE, f"calibrate {TINY} --prompts prompts.txt --count 2", "1 prompts"),
    (USAGE, f"calibrate {TINY} --count 99999", "10000"),
    (USAGE, "eval plan.json --weights W --prompts stats.npz", "one prompt a line"),
    (USAGE, "calibrate notmodel prompts.txt", "prompts.txt"),
    # names
    (USAGE, f"calibrate {TINY} --scheduler Eulr", "EulerDiscreteScheduler"),
    (USAGE, f"calibrate {TINY} --scheduler unipc", "UniPCMultistepScheduler"),
    (USAGE, f"calibrate {TINY} --scheduler Zzz", "others"),
    (USAGE, """check plan.json --weights W --call '{"steps": 3}'""", "num_inference_steps"),
    (USAGE, "demo more", "more"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a user's files."""
    folder = tmp_path_factory.mktemp("mistakes")
    weights_of(folder / "W", blocks=4)
    Plan.from_dict(example()).save(folder / "plan.json")
    stats = random_stats(0)
    stats.save(folder / "stats.npz")
    random_stats(1, groups=1).save(folder / "other.npz")
    (folder / "cut.npz").write_bytes(stats.to_bytes()[:-400])
    (folder / "text.npz").write_text("hello")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "list.json").write_text('["a large red circle"]')
    PlanSet(plans=(Plan.from_dict(example()),)).save(folder / "bundled.json")
    (folder / "empty.txt").write_text("\n")
    (folder / "prompts.txt").write_text("a large red circle\n")
    (folder / "notmodel").mkdir()
    (folder / "notmodel" / "model_index.json").write_text("{}")
    (folder / "folder").mkdir()
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def typed(text: str) -> Result:
    return CliRunner().invoke(main, shlex.split(text), prog_name="layercache")


def told(result: Result, code: int) -> str:
    """What a failed command says: one or two lines, and nothing on stdout."""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    assert result.stdout == "" and "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    # Above may stand what the command logged while it still went well.
    starts = [number for number, line in enumerate(lines) if line.startswith("Error: ")]
    assert len(starts) == 1, result.stderr
    said = lines[starts[0] :]
    assert len(said) == (2 if code == USAGE else 1), result.stderr
    assert code != USAGE or said[1].startswith("Try 'layercache")
    assert len(said[0]) < 600
    return "\n".join(said)


@pytest.mark.parametrize(("code", "text", "word"), MISTAKES, ids=[m[1][:60] for m in MISTAKES])
def test_a_mistake_is_told(code: int, text: str, word: str, place: Path) -> None:
    before = sorted(path.name for path in place.iterdir())
    assert word in told(typed(text), code)
    assert sorted(path.name for path in place.iterdir()) == before, "nothing is left behind"


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*.json")), ids=lambda path: path.stem)
def test_a_malformed_file_is_told(path: Path) -> None:
    for command in ("inspect", "bundle", "push"):
        more = " me/model" if command == "push" else ""
        if path.stem.startswith("set") and command != "push":
            continue
        assert path.name in told(typed(f"{command} {path}{more}"), FAILED)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device here")
def test_a_device_is_told_before_anything_runs() -> None:
    for command in ("compile stats.npz --budget 2x", "merge stats.npz", "bundle plan.json"):
        assert "is a device" in told(typed(f"{command} --out /dev/full"), USAGE)
    assert not os.path.isfile("/dev/full")


def test_a_gpu_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "cuda" in told(typed("check plan.json --weights W --device cuda"), USAGE)


@pytest.mark.parametrize("command", ["bundle plan.json --out set.json", "calibrate " + TINY])
def test_an_interrupted_command_ends_with_130(
    command: str, monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PlanSet, "to_bytes", interrupt)
    monkeypatch.setattr("layercache.calibration.calibrate", interrupt)
    message = told(typed(command), INTERRUPTED)
    assert message.startswith("Error: interrupted")
    assert ("goes on from there" in message) == command.startswith("calibrate")
    assert not (place / "set.json").exists()


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (MemoryError(), "--offload"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried"), "--offload"),
        (type("ConnectError", (Exception,), {"__module__": "httpx"})("no route"), "network"),
        (ModuleNotFoundError("x", name="matplotlib.figure"), "layercache-flow[plot]"),
        (ModuleNotFoundError("x", name="sentencepiece"), "pip install sentencepiece"),
        (OSError(28, "No space left on device", "set.json"), "set.json: No space left"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_machine_lacks_is_told(
    error: Exception, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(PlanSet, "to_bytes", fail)
    assert word in told(typed("bundle plan.json --out set.json"), FAILED)


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("a fault")

    monkeypatch.setattr(PlanSet, "to_bytes", fail)
    result = typed("bundle plan.json --out set.json")
    assert isinstance(result.exception, ValueError)


# -- imports -------------------------------------------------------------------------------------

IMPORTS = [
    ("check plan.json", "torch", "diffusers"),
    ("check plan.json", "diffusers", "diffusers"),
    ("calibrate", "torch", "diffusers"),
    ("refine plan.json --stats stats.npz", "transformers", "diffusers"),
    ("eval plan.json", "torchmetrics", "eval"),
    ("eval plan.json --out made", "matplotlib", "plot"),
    ("eval plan.json --out made", "PIL", "plot"),
    ("demo --out made", "torchmetrics", "eval"),
    ("demo --out made", "PIL", "plot"),
    ("push plan.json me/model", "huggingface_hub", "hub"),
    ("check plan.json --offload model", "accelerate", "diffusers"),
]


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in names else find(name, *a)
    )


@pytest.mark.parametrize(("command", "module", "extra"), IMPORTS)
def test_what_is_not_installed_is_told_first(
    command: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    hide(monkeypatch, module)
    # Nothing was loaded, read or made by then.
    monkeypatch.setattr(Plan, "load", lambda path: pytest.fail("something was begun"))
    message = told(typed(command), FAILED)
    assert module in message and f"layercache-flow[{extra}]" in message
    assert not (place / "made").exists()


def test_several_extras_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "torch", "torchmetrics", "matplotlib")
    assert "layercache-flow[diffusers,eval,plot]" in told(typed("demo"), FAILED)


def test_only_what_was_asked_for_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, *EXTRAS)
    for command in (
        "check plan.json --stats stats.npz", "compile stats.npz --budget 0.8 --out p.json",
        "inspect plan.json", "merge stats.npz --out m.npz", "bundle plan.json --out b.json",
        "explore stats.npz --out e.html",
    ):  # fmt: skip
        result = typed(command)
        assert "not installed" not in result.stderr
        assert result.exit_code in (OK, MISMATCH), result.output


def test_the_table_of_imports_holds_commands_options_and_modules() -> None:
    assert set(COMMANDS) <= set(main.commands)
    for modules in (*COMMANDS.values(), *OPTIONS.values()):
        assert set(modules) <= {*EXTRAS, "peft"}
    for command, option in OPTIONS:
        chosen = main.commands.values() if command == "*" else [main.commands[command]]
        assert any(option == parameter.name for each in chosen for parameter in each.params)


def test_extras_are_those_of_the_package() -> None:
    text = (CORPUS.parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    for module, extra in EXTRAS.items():
        package = {"PIL": "pillow"}.get(module, module)
        stated = section.partition(f"\n{extra} = [")[2].partition("]\n")[0]
        assert f'"{package}' in stated, f"{extra} does not hold {package}"


def test_commands_that_need_no_extra_run_without() -> None:
    code = (
        f"import sys\nfor name in {sorted(EXTRAS)!r}: sys.modules[name] = None\n"
        "from layercache.cli import main\nmain()"
    )
    for command in ("inspect plan.json", "check plan.json --weights W", "push plan.json me/model"):
        result = subprocess.run(
            [sys.executable, "-c", code, *command.split()], capture_output=True, text=True
        )
        assert "Traceback" not in result.stderr
        assert (result.returncode == 0) == command.startswith("inspect"), result.stderr
        assert result.returncode == 0 or "pip install 'layercache-flow[" in result.stderr
