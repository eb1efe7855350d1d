"""Files of the plan format that every later version must read, and those that none may."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from layercache import Plan, PlanError, PlanSet

CORPUS = Path(__file__).parent.parent / "plans" / "corpus"
VALID = sorted((CORPUS / "valid").glob("*.json"))
MALFORMED = sorted((CORPUS / "malformed").glob("*.json"))


def kind_of(path: Path) -> type[Plan] | type[PlanSet]:
    return PlanSet if path.stem.startswith("set") else Plan


@pytest.mark.parametrize("path", VALID, ids=lambda p: p.stem)
def test_a_valid_file_is_read_and_written_back_with_the_same_meaning(
    path: Path, tmp_path: Path
) -> None:
    kind = kind_of(path)
    read = kind.load(path)
    read.save(tmp_path / "again.json")
    assert kind.load(tmp_path / "again.json") == read
    # Nothing that the file says is lost.
    said = json.loads(path.read_text(encoding="utf-8"))
    written = json.loads((tmp_path / "again.json").read_text(encoding="utf-8"))
    for one, other in zip(said.get("plans", [said]), written.get("plans", [written]), strict=True):
        assert {key: other[key] for key in one if key != "asked"} == {
            key: value for key, value in one.items() if key != "asked"
        }
        assert {key: other["asked"][key] for key in one["asked"]} == one["asked"]


@pytest.mark.parametrize("path", MALFORMED, ids=lambda p: p.stem)
def test_a_malformed_file_is_refused_with_its_name(path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        kind_of(path).load(path)
    text = str(caught.value)
    assert path.name in text and len(text) < 600
    text.encode("utf-8")  # nothing that a terminal cannot show


def test_the_list_names_every_malformed_file() -> None:
    text = (CORPUS / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`([\w-]+\.json)`", text)) == {p.name for p in MALFORMED}
    assert len(MALFORMED) > 30
