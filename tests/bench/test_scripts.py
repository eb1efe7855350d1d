"""Every script in bench/ runs, at tiny size; one without a test fails here."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from tests.test_cli import weights_of

ROOT = Path(__file__).parents[2]

TINY = {
    "bench.__main__": "--quick --methods uniform --weights {weights} --out {out} --json",
    "bench.calibration": "--quick --json",
    "bench.calibration_plans": "--quick --json --picture {out}/prompts.png",
    "bench.heterogeneity": "--model main --groups 2 --prompts 1",
    "bench.quality": "--quick --folder {out} --json {out}/quality.json --shares 0.7",
    "bench.reference.train": "--out {out} --steps 1 --batch 1 --no-compile --stale-first 1",
    "bench.runtime": "--quick --weights {weights} --json",
    "bench.samplers": "--quick --json",
    "bench.solver": "--quick --json",
    "bench.surrogate": "--quick --json",
}
"""The arguments of a tiny run. `{out}` is an empty folder, `{weights}` one of a tiny model."""


def runs_elsewhere(module: str) -> bool:
    """Whether another file of this folder imports the script and calls what it does."""
    package, _, name = module.rpartition(".")
    for path in set(Path(__file__).parent.glob("test_*.py")) - {Path(__file__)}:
        text = path.read_text(encoding="utf-8")
        imported = re.search(rf"^from {re.escape(package)} import .*\b{name}\b", text, re.M)
        if imported and re.search(rf"\b{name}\.\w+", text):
            return True
    return False


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
    if module not in TINY and runs_elsewhere(module):
        return
    assert module in TINY, f"{module} has no test: say here how it runs at tiny size"
    if "{weights}" in TINY[module]:
        weights_of(tmp_path / "weights", blocks=4)
    places = {"out": tmp_path / "out", "weights": tmp_path / "weights"}
    places["out"].mkdir()
    arguments = TINY[module].format(**places).split()
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


def test_bench_is_not_installed() -> None:
    import tomllib

    from setuptools import find_packages

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    include = settings["tool"]["setuptools"]["packages"]["find"]["include"]
    found = find_packages(str(ROOT), include=include)
    assert found and all(name.split(".")[0] == "layercache" for name in found)
