"""Every script in bench/ runs, at tiny size; one without a test fails here."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

TINY = {
    "bench.__main__": "--quick --rounds 1 --methods uniform --json --out {out}",
    "bench.calibration": "--quick --json",
    "bench.calibration_plans": "--quick --json --picture {out}/prompts.png",
    "bench.quality": "--quick --folder {out} --json {out}/quality.json",
    "bench.reference.train": "--out {out} --steps 1 --batch 1 --no-compile",
    "bench.runtime": "--quick --json",
    "bench.solver": "--quick --json",
}
"""The arguments of a tiny run. `{out}` is an empty folder."""

ELSEWHERE: dict[str, str] = {}
"""Scripts that another file of this folder runs, and which one does."""


def scripts() -> list[str]:
    """The modules that do something when they are run."""
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "bench").rglob("*.py"))
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("module", scripts())
def test_every_script_runs_at_tiny_size(
    module: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if module in ELSEWHERE:
        text = (Path(__file__).parent / ELSEWHERE[module]).read_text(encoding="utf-8")
        assert module in text
        return
    assert module in TINY, f"{module} has no test: say here how it runs at tiny size"
    arguments = TINY[module].format(out=tmp_path).split()
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    threads = torch.get_num_threads()
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        assert not end.code
    finally:
        torch.set_num_threads(threads)
    if arguments[-1] == "--json":
        assert json.loads(capsys.readouterr().out)


def test_no_test_is_of_a_script_that_is_gone() -> None:
    assert set(TINY) | set(ELSEWHERE) <= set(scripts())


def test_bench_is_not_installed() -> None:
    import tomllib

    from setuptools import find_packages

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    include = settings["tool"]["setuptools"]["packages"]["find"]["include"]
    found = find_packages(str(ROOT), include=include)
    assert found and all(name.split(".")[0] == "layercache" for name in found)
