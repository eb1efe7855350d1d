"""A model of one's own, from a folder that diffusers saved: three commands, or eight lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from click.testing import CliRunner, Result

from layercache import Plan, compile_plan
from layercache.calibration import calibrate
from layercache.cli import main
from layercache.cli._model import _dtype_for
from layercache.runtime import apply_plan, check_run
from tests.pipelines.entry import Entry
from tests.pipelines.registry import ENTRIES

MODEL = Path(__file__).parents[1] / "bench" / "models" / "pictures"
CALL = json.dumps({"height": 64, "width": 64, "max_sequence_length": 20, "guidance_scale": 1.0})
PROMPTS = ("a large red apple on a blue background", "a small dog on a green background")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def succeeded(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts, statistics and a plan of the model."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    succeeded(
        "calibrate", MODEL, "--prompts", folder / "prompts.txt", "--steps", 6, "--groups", 2,
        "--lags", 2, "--probes", 0, "--call", CALL, "--out", folder / "stats.npz",
    )  # fmt: skip
    succeeded("compile", folder / "stats.npz", "--budget", "0.7", "--out", folder / "plan.json")
    return folder


def test_the_plan_holds_the_call(work: Path) -> None:
    plan = Plan.load(work / "plan.json")
    assert plan.setting["call"] == json.loads(CALL)
    assert plan.setting["pipeline"] == "FluxPipeline"


def test_check_takes_the_call_from_the_plan(work: Path) -> None:
    result = succeeded("check", work / "plan.json", MODEL, "--json")
    assert json.loads(result.stdout) == {"fits": True, "warnings": []}


@pytest.mark.parametrize("changed", ['{"num_inference_steps": 5}', '{"num_inference_steps": 12}'])
def test_check_refuses_what_the_runtime_would(work: Path, changed: str) -> None:
    result = run("check", work / "plan.json", MODEL, "--call", changed)
    assert result.exit_code == 3 and "steps" in result.stderr


def test_check_refuses_another_scheduler_whose_noise_levels_differ(work: Path) -> None:
    result = run("check", work / "plan.json", MODEL, "--scheduler", "UniPCMultistepScheduler")
    assert result.exit_code == 3, result.output


def test_eval_runs_the_call_of_the_plan(work: Path) -> None:
    result = succeeded(
        "eval", work / "plan.json", "--pipe", MODEL, "--prompts", work / "prompts.txt", "--json"
    )
    assert json.loads(result.stdout)["rows"][0]["method"] == "layercache"


@pytest.mark.parametrize(
    ("options", "needle"),
    [
        (("--call", '{"hieght": 64}'), "height"),
        (("--scheduler", "EulerDiscreet"), "Scheduler"),
        (("--device", "nonsense"), "nonsense"),
        (("--dtype", "int8"), "float32"),
        (("--offload", "all"), "sequential"),
    ],
)
def test_a_mistake_in_the_model_options_is_a_usage_error(
    work: Path, options: tuple[str, str], needle: str
) -> None:
    result = run("check", work / "plan.json", MODEL, *options)
    assert result.exit_code == 2 and needle in result.stderr


def test_model_and_pipe_name_one_model(work: Path) -> None:
    assert run("check", work / "plan.json", MODEL, "--pipe", "reference").exit_code == 2


def test_the_dtype_is_that_of_the_files_but_on_a_cpu() -> None:
    assert _dtype_for(MODEL, "cuda") == "float16"
    assert _dtype_for(MODEL, "cpu") == "float32"


# -- in Python, every family -----------------------------------------------------------------------


def families() -> list[Entry]:
    found: dict[str, Entry] = {}
    for entry in ENTRIES:
        if not entry.refused and not entry.patched and "Modular" not in entry.pipeline:
            kind = type(getattr(entry.build(), entry.component)).__name__
            found.setdefault(kind, entry)
    return list(found.values())


@pytest.mark.parametrize("entry", families(), ids=lambda entry: entry.pipeline)
def test_eight_lines_from_a_folder_to_an_image(entry: Entry, tmp_path: Path) -> None:
    prompt, call = entry.prompt(0), entry.call()

    # Prompts are embeddings here, so that there are no text encoders and tokenizers to load.
    built = entry.build()
    built.save_pretrained(tmp_path / "model")
    parts = built.components.items()
    given = {name: part for name, part in parts if not hasattr(part, "save_pretrained")}
    pipe: Any = getattr(diffusers, entry.pipeline).from_pretrained(tmp_path / "model", **given)
    if "_encode_prompt" in vars(built):
        pipe._encode_prompt = built._encode_prompt
    stats = calibrate(
        pipe, [prompt], component=entry.component, num_inference_steps=entry.steps, groups=2,
        lags=2, probes=0, call_kwargs=call, progress=False,
    )  # fmt: skip
    plan = compile_plan(stats, 0.7)
    plan.save_pretrained(tmp_path / "model")
    arguments = {**prompt, **call, "num_inference_steps": entry.steps}
    with torch.no_grad(), apply_plan(pipe, Plan.from_pretrained(tmp_path / "model")) as run:
        pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="latent")
    report = run.report()
    assert report.runs == 1 and not report.problems
    assert check_run(pipe, plan, arguments) == []
