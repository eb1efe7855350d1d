"""Commands and snippets of the documents run as they are shown, on small models.

What is written is run but for a few substitutions of text: the checkpoint by a model of the same
format that is part of the repository, its size and step count by small ones, the GPU by what there
is. A block that cannot be run here has a comment before it that says why: `<!-- not run: ... -->`.
"""

from __future__ import annotations

import functools
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from click.testing import CliRunner

from layercache import Budget, CalibrationStats, Plan, PlanSet, compile_plan, pareto
from layercache.calibration import calibrate
from layercache.cli import main
from tests.test_cli import weights_of

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "bench" / "models" / "pictures"
if not (MODEL / "model_index.json").exists():
    pytest.skip("the source archive has no weights of this model", allow_module_level=True)
PAGES = ("README.md", *(f"docs/{name}.md" for name in (
    "adding-a-model", "calibration", "choosing", "command-line", "package", "publishing",
    "quickstart", "refining", "runtime",
)))  # fmt: skip
SMALL = {
    "black-forest-labs/FLUX.1-dev": "model",
    "you/model": "model",
    " MODEL": " model",
    '.to("cuda")': "",
    "torch.bfloat16": "torch.float32",
    "1024": "64",
    "=28": "=6",
    "=50": "=6",
    "--steps 28": "--steps 6",
    "--steps 40": "--steps 5",
    "steps=40": "steps=5",
    "1328x800": "128x64",
    "(1328, 800)": "(128, 64)",
    "--shift 5": "--shift 2.2",
    ", ...": "",
}
"""What stands in the documents, and what is run in its place."""
ELSEWHERE = ("pip ", "make ", "torchrun ", "python -m bench", "layercache push ")
"""Commands that other tests run, or that need another machine."""
CALL = {"height": 64, "width": 64, "max_sequence_length": 20, "num_inference_steps": 6}
PROMPTS = ("a large red apple on a blue background", "a small dog on a green background")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    kind: str
    text: str
    not_run: str

    def small(self, smaller: Mapping[str, str]) -> str:
        """What is run."""
        text = self.text
        for shown, run in smaller.items():
            text = text.replace(shown, run)
        return text


def blocks(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = r"(?:<!-- not run: (?P<why>.*?) -->\n+)?```(?P<kind>python|bash)\n(?P<text>.*?)^```"
    for match in re.finditer(found, text, re.S | re.M):
        line = text.count("\n", 0, match.start("text"))
        yield Block(page, line, match["kind"], match["text"], match["why"] or "")


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a block, without comments and continued lines, with its variables."""
    variables: dict[str, str] = {}
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words or line.startswith(ELSEWHERE):
            continue
        name, is_set, value = words[0].partition("=")
        if len(words) == 1 and is_set:
            variables[f"${name}"] = value
            continue
        yield [variables.get(word, word) for word in words]


def shortened(words: list[str], weights: Path) -> list[str]:
    """A command with few steps, and on the reference model with tiny weights."""
    command, *rest = words[1:]
    runs = command in ("calibrate", "check", "eval", "refine", "trial")
    if runs and not {"model", "one", "two"} & set(rest):
        rest += ["--weights", str(weights)]
        if "--count" in rest:
            rest[rest.index("--count") + 1] = "2"
    if command == "calibrate" and "--steps" not in rest:
        rest += ["--steps", "6"]
    return [command, *rest]


@pytest.fixture(scope="module", autouse=True)
def small_calls() -> Iterator[None]:
    """Pictures are small where a document leaves their size to the checkpoint."""
    inner = diffusers.FluxPipeline.__call__

    @functools.wraps(inner)
    def call(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **CALL | kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers.FluxPipeline, "__call__", call)
        yield


@pytest.fixture(scope="module")
def pipe() -> Any:
    found = diffusers.FluxPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, pipe: Any) -> Path:
    """A user's folder: a model with its plans, prompts, statistics, and tiny reference weights."""
    folder = tmp_path_factory.mktemp("user")
    weights_of(folder / "weights", blocks=4)
    shutil.copytree(MODEL, folder / "model")
    for name in ("prompts.txt", "others.txt"):
        (folder / name).write_text("\n".join(PROMPTS))
    stats = calibrate(pipe, PROMPTS, num_inference_steps=6, probes=1, progress=False)
    stats.save(folder / "stats.npz")
    plans = PlanSet(plans=pareto(stats, ["2x", "3x"]))
    plans.save_pretrained(folder / "model")
    for name, plan in zip(("plan.json", "plan-3x.json"), plans.plans, strict=True):
        plan.save(folder / name)
    plans.plans[0].save(folder / "plan-2x.json")
    return folder


def given(pipe: Any) -> dict[str, Any]:
    """What pages take for granted, by the names that they use."""
    stats = CalibrationStats.load("stats.npz")
    return {
        "pipe": pipe, "prompts": list(PROMPTS), "setting": {}, "stats": stats,
        "plan": Plan.load("plan.json"), "compile_plan": compile_plan, "Budget": Budget,
        "torch": torch, "noise": torch.ones(2), "velocity": lambda latent, sigma: latent,
    }  # fmt: skip


def run_page(page: str, names: dict[str, Any], smaller: Mapping[str, str], folder: Path) -> None:
    """Run every block of a page that is to be run; Python adds to the names."""
    for block in blocks(page):
        if block.not_run:
            continue
        if block.kind == "python":
            lines = "\n" * block.line + block.small(smaller)
            with torch.no_grad():
                exec(compile(lines, block.page, "exec"), names)
            continue
        for words in commands(block.small(smaller)):
            assert words[0] == "layercache", f"{page}: {words}"
            done = CliRunner().invoke(main, shortened(words, folder / "weights"))
            assert done.exit_code == 0, f"{page}, line {block.line}: {words}\n{done.output}"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_from_its_first_line_to_its_last(
    page: str, prepared: Path, pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    scheduler = pipe.scheduler
    try:
        run_page(page, given(pipe), SMALL, tmp_path)
    finally:
        pipe.scheduler = scheduler
