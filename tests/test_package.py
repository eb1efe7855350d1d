"""What is shipped: both archives are built, and hold what they should."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import layercache

ROOT = Path(__file__).parent.parent
WEIGHTS = tuple(f"bench/models/pictures/{part}/" for part in ("transformer", "vae"))
"""Large, and in neither archive."""
BUILD = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archives, built from a copy of what git tracks."""
    tree = tmp_path_factory.mktemp("package") / "tree"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    names = [name for name in listed.stdout.decode().split("\0") if name]
    if not names:
        pytest.skip("not a git checkout")
    for name in names:
        if (ROOT / name).is_file() and not name.startswith(WEIGHTS):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    built = subprocess.run([sys.executable, "-c", BUILD], cwd=tree, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return tree / "dist"


def test_the_wheel_holds_the_package_and_nothing_else(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"layercache"}
    for needed in (
        "py.typed",
        "evaluation/explore.html",
        "evaluation/report.html",
        "reference/weights/training.json",
    ):
        assert f"layercache/{needed}" in names
    assert not [name for name in names if "test" in name]


def test_the_source_archive_can_be_tested_and_read(dist: Path) -> None:
    (source,) = dist.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    tracked = {
        path.relative_to(ROOT).as_posix()
        for folder in ("tests", "docs", "plans", "examples", "integrations")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }
    assert tracked <= names
    for needed in ("CHANGELOG.md", "CITATION.cff", "LICENSE", "Makefile", "constraints.txt"):
        assert needed in names
    # What the documents show and link to is there.
    for document in (path for path in names if path.endswith(".md")):
        text = (ROOT / document).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            place = os.path.normpath(Path(document).parent / target)
            assert target.startswith("http") or place in names, f"{document}: {target}"
    assert not [name for name in names if name.startswith(WEIGHTS)]


def test_the_text_on_an_index_needs_no_checkout(dist: Path) -> None:
    """An index shows one page, from which no path of the repository leads anywhere."""
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = metadata.get_payload()
    assert "pip install" in text and "apply_plan" in text
    links = re.findall(r"\]\(([^)\s]+)\)|<img|src=", text)
    assert all(link.startswith("https://") for link in links), links


def test_one_version_stands_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert layercache.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_extra_is_named_in_the_readme() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"`{extra}`" in text for extra in project["optional-dependencies"])
