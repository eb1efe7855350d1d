"""`plans/`: the specification, its example and the schema agree with the code."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from layercache.errors import PlanError
from layercache.options import Options
from layercache.plan import Certificate, Measured, Plan, Predicted, UnitPlan
from layercache.plan_set import PlanSet

PLANS = Path(__file__).parent.parent / "plans"


def example() -> dict[str, object]:
    text = (PLANS / "README.md").read_text(encoding="utf-8")
    found = re.search(r"```json\n(.*?)```", text, re.DOTALL)
    assert found is not None
    result: dict[str, object] = json.loads(found[1])
    return result


def test_the_schema_file_is_that_of_the_model() -> None:
    written = json.loads((PLANS / "schema.json").read_text(encoding="utf-8"))
    assert written.pop("$schema") == "https://json-schema.org/draft/2020-12/schema"
    assert written == Plan.model_json_schema(), "run `make schema`"


def test_the_example_of_the_specification_is_a_valid_plan() -> None:
    plan = Plan.from_dict(example())
    assert plan.run_steps == (True, True, True, False, True, True, False, True)
    assert Plan.from_dict(plan.to_dict()) == plan


def test_the_specification_names_every_key() -> None:
    text = (PLANS / "README.md").read_text(encoding="utf-8")
    models = (Plan, UnitPlan, Predicted, Measured, Certificate, PlanSet)
    names = [name for model in models for name in model.model_fields]
    for name in names + [field.name for field in fields(Options)]:
        assert f"`{name}`" in text or f'"{name}"' in text, name


def test_the_schema_refuses_unknown_keys_at_every_level() -> None:
    schema = json.loads((PLANS / "schema.json").read_text(encoding="utf-8"))
    for name, part in {"Plan": schema, **schema["$defs"]}.items():
        assert part["additionalProperties"] is False, name


@pytest.mark.parametrize(
    "place,value,message",
    [
        (
            ("schema_version",),
            2,
            "schema_version 2",
        ),
        (("nonsense",), 1, "plan.nonsense"),
        (("units", 1, "cells"), ".0#.##.#", r"cells\[0\] is '.'"),
        (("units", 1, "cells"), "#0#0##.#", r"units\[1\].cells\[3\] is '0': a group is idle"),
        (("units", 1, "cells"), "#3#.##.#", "span 3"),
        (("units", 2, "start"), 1, "overlaps the group before it"),
        (("units", 2, "stop"), 5, "is not in model.block_lists"),
        (("sigmas", 3), 0.9, "sigmas must fall strictly"),
        (("budget",), {"fraction": 0.5, "speedup": 2.0}, "exactly one of fraction, speedup"),
    ],
)
def test_what_the_specification_forbids_is_refused(
    place: tuple[str | int, ...], value: object, message: str
) -> None:
    data = example()
    inner: object = data
    for key in place[:-1]:
        inner = inner[key]  # type: ignore[index]
    inner[place[-1]] = value  # type: ignore[index]
    with pytest.raises(PlanError, match=message):
        Plan.from_dict(data)
