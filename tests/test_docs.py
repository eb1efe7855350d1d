"""Documents: links lead somewhere, and one thing has one word."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for folder in (".", "docs", "bench", "integrations", "plans", "layercache/reference/weights")
    for path in (ROOT / folder).glob("**/*.md" if folder != "." else "*.md")
)
HISTORY = {Path("CHANGELOG.md"), Path("bench/FINDINGS.md"), Path("bench/README.md")}
"""These tell of what was, in the words of its time."""
OTHER_WORDS = {
    r"refresh(ed|es)?": "computed",
    r"base steps?": "taps, span",
    r"trajectory gains": "taps",
    r"propagation": "growth",
    r"polish(ing)?": "search",
}
"""Words that stood for a thing, and the one word for it."""


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_somewhere(document: Path) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (ROOT / document.parent / target).exists(), f"{document}: {target}"


@pytest.mark.parametrize("document", sorted(set(DOCUMENTS) - HISTORY), ids=str)
def test_one_thing_has_one_word(document: Path) -> None:
    if "results" in document.parts:
        return
    text = (ROOT / document).read_text(encoding="utf-8")
    for word, use in OTHER_WORDS.items():
        found = re.search(rf"\b{word}\b", text, re.I)
        assert found is None, f"{document}: {found and found[0]!r}; the word is {use}"


def test_the_reference_lists_every_public_name() -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## `([\w.]+)`\n(.*?)(?=^## |\Z)", text, re.M | re.S))
    listed = {name: re.findall(r"^\| `(\w+)` \|", part, re.M) for name, part in sections.items()}
    for module in (
        "layercache",
        *(f"layercache.{n}" for n in ("calibration", "models", "runtime")),
    ):
        assert sorted(listed.pop(module)) == sorted(importlib.import_module(module).__all__)
    (errors,) = listed.values()
    found = vars(importlib.import_module("layercache.errors"))
    assert sorted(errors) == sorted(name for name in found if name.endswith("Error"))
    for place in re.findall(r"^\| `(layercache[\w.]+)\.(\w+)` \|", text, re.M):
        assert callable(getattr(importlib.import_module(place[0]), place[1]))
