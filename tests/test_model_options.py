"""A model of one's own, from a folder that diffusers saved: three commands, or eight lines."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from click.testing import CliRunner, Result

from layercache import Plan, compile_plan
from layercache.calibration import calibrate
from layercache.cli import main
from layercache.cli._model import _dtype_for, _may_be
from layercache.runtime import apply_plan, check_run
from tests.pipelines.entry import Entry
from tests.pipelines.registry import ENTRIES

MODEL = Path(__file__).parents[1] / "bench" / "models" / "pictures"
if not (MODEL / "model_index.json").exists():
    pytest.skip("the source archive has no weights of this model", allow_module_level=True)
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


def test_check_warns_of_another_size(work: Path) -> None:
    result = succeeded("check", work / "plan.json", MODEL, "--call", '{"height": 96}', "--json")
    assert json.loads(result.stdout)["warnings"] == ["height is 64 in the plan and 96 here"]


def test_check_refuses_another_size_where_the_shift_follows_from_it(tmp_path: Path) -> None:
    model = shutil.copytree(MODEL, tmp_path / "model")
    config = model / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dynamic_shifting": True}))
    (tmp_path / "prompts.txt").write_text(PROMPTS[0])
    stats, plan, wide = (tmp_path / name for name in ("stats.npz", "plan.json", "wide.json"))
    succeeded(
        "calibrate", model, "--prompts", tmp_path / "prompts.txt", "--steps", 4, "--groups", 2,
        "--lags", 1, "--mode", "residual", "--call", CALL, "--out", stats,
    )  # fmt: skip
    succeeded("compile", stats, "--budget", "0.75", "--out", plan)
    larger = ("--call", '{"width": 128}')
    assert succeeded("check", plan, model).exit_code == 0
    assert run("check", plan, model, *larger).exit_code == 3
    assert run("eval", plan, model, *larger, "--prompts", tmp_path / "prompts.txt").exit_code == 3
    # The same statistics make a plan for it.
    succeeded("compile", stats, "--budget", "0.75", "--size", "128x64", "--out", wide)
    assert json.loads(succeeded("check", wide, model, "--json").stdout)["warnings"] == []
    assert run("check", wide, model, "--call", '{"width": 64}').exit_code == 3


@pytest.mark.parametrize("command", ["eval", "refine"])
def test_a_run_that_the_plan_refuses_is_refused_before_it_is_computed(
    work: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusers.FluxTransformer2DModel, "forward", never)
    more = ("--stats", work / "stats.npz") if command == "refine" else ()
    prompts = ("--prompts", work / "prompts.txt")
    changed = ("--call", '{"num_inference_steps": 7}')
    result = run(command, work / "plan.json", MODEL, *more, *prompts, *changed)
    assert result.exit_code == 3 and "7 steps" in result.stderr


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("computed")


def test_inspect_says_what_a_plan_is_for(work: Path) -> None:
    made_for, read = (
        next(
            line
            for line in succeeded("inspect", work / "plan.json").stdout.splitlines()
            if part in line
        )
        for part in ("made for", "foretold")
    )
    for part in (
        "FluxPipeline.transformer", "64x64", "6 steps of FlowMatchEulerDiscreteScheduler (shift 2)",
        "guidance_scale 1.0", "float32",
    ):  # fmt: skip
        assert part in made_for
    assert "2 calibration prompts" in read and "no bound" in read


@pytest.mark.parametrize(
    "setting",
    [{}, {"pixels": 3, "width": "a", "scheduler_shift": "b"}, {"pixels": [1], "num_frames": {}}],
)
def test_inspect_of_a_plan_with_a_strange_setting(work: Path, setting: dict[str, Any]) -> None:
    plan = Plan.load(work / "plan.json").model_copy(update={"setting": setting})
    assert "made for" in plan.summary()


@pytest.mark.parametrize(
    ("value", "annotation", "possible"),
    [
        (64, int | None, True), (64, float, True), ("64", int, False), (None, int, True),
        (["a"], str | list[str], True), ([1], list[torch.Tensor], False),
        ({"scale": 1}, dict[str, Any] | None, True), (1, torch.Tensor, False),
        (1, "Callable[[int, int], None]", False), ("a", inspect.Parameter.empty, True),
        (True, bool, True), ([64, 64], tuple[int, int], True),
    ],
)  # fmt: skip
def test_what_json_can_hold_of_an_argument(value: Any, annotation: Any, possible: bool) -> None:
    assert _may_be(value, annotation) is possible


def test_eval_records_what_it_measured(work: Path) -> None:
    arguments = ("eval", work / "plan.json", MODEL, "--prompts", work / "prompts.txt")
    succeeded(*arguments, "--record", work / "measured.json")
    plan, before = Plan.load(work / "measured.json"), Plan.load(work / "plan.json")
    assert plan.measured is not None and not plan.measured.calibration_prompts
    assert plan.measured.images == len(PROMPTS)
    assert plan.model_copy(update={"measured": None}) == before


def test_a_trial_keeps_the_measured_best(work: Path) -> None:
    result = succeeded(
        "trial", work / "stats.npz", MODEL, "--budget", "0.7", "--prompts", work / "prompts.txt",
        "--out", work / "best.json", "--json",
    )  # fmt: skip
    told = json.loads(result.stdout)
    best = Plan.load(work / "best.json").measured
    assert best is not None and best.calibration_prompts
    assert best.model_dump(mode="json") == told["measured"][told["best"]]
    fastest = max(seen["speedup"] for seen in told["measured"].values())
    fair = [s for s in told["measured"].values() if s["speedup"] >= 0.95 * fastest]
    assert best.psnr_db == max(seen["psnr_db"] for seen in fair)
    assert "generations" in result.stderr


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
        pipe, [prompt], component=entry.component, num_inference_steps=entry.steps,
        groups=2 if entry.grouped else None, lags=2, probes=0, call_kwargs=call, progress=False,
    )  # fmt: skip
    plan = compile_plan(stats, 0.7)
    plan.save_pretrained(tmp_path / "model")
    arguments = {**prompt, **call, "num_inference_steps": entry.steps}
    with torch.no_grad(), apply_plan(pipe, Plan.from_pretrained(tmp_path / "model")) as run:
        pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="latent")
    report = run.report()
    assert report.runs == 1 and not report.problems
    assert check_run(pipe, plan, arguments) == []
