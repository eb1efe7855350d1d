"""Plan files: equal after a round trip, readable, and refused when anything is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layercache.costs import peak_bytes
from layercache.errors import ModelMismatchError, PlanError
from layercache.options import Options
from layercache.plan import Budget, Plan

STEPS = 6


def plan_dict(**changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = {
        "schema_version": 1,
        "generator": "layercache test",
        "model": {"class_name": "M", "block_lists": {"blocks": 8}, "architecture": "x"},
        "setting": {"num_inference_steps": STEPS, "dtype": "float32"},
        "sigmas": [1.0, 0.8, 0.6, 0.4, 0.3, 0.2, 0.0],
        "branches": 2,
        "units": [
            {"kind": "step", "cells": "##0#00", "taps": [[], [0.5], [], [0.7, -0.2], [], []]},
            {"kind": "group", "block_list": "blocks", "start": 0, "stop": 4, "cells": "##.1.."},
            {"kind": "group", "block_list": "blocks", "start": 4, "stop": 8, "cells": "##.0.."},
        ],
        "budget": {"fraction": 0.5},
        "asked": {"units": ["step", "groups"]},
        "predicted": {
            "speedup": 2.0,
            "compute_share": 0.5,
            "psnr_db": 40.0,
            "psnr_worst_db": 39.0,
            "cache_bytes": 100,
        },
        "certificate": {"solver": "dp", "value": 1.0, "lower_bound": 0.9},
    }
    return data | changes


STEP = {"kind": "step", "cells": "######"}
GROUP = {"kind": "group", "block_list": "blocks", "start": 0, "stop": 4, "cells": "######"}


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    """Any valid row, of the step unit or of a group."""
    kind = draw(st.sampled_from(["step", "group"]))
    cells, taps, computed = ["#"], [[]], [0]  # type: list[str], list[list[float]], list[int]
    for step in range(1, STEPS):
        here = draw(st.booleans())
        most = len(computed) - (kind == "group")
        numbers = st.lists(st.floats(-3, 3).map(lambda b: b or 1.0), max_size=most)
        row = draw(numbers) if here == (kind == "step") else []
        span = computed[-1] - computed[-1 - len(row)] if row and kind == "group" else 0
        cells.append("#" if here else str(span))
        taps.append(row)
        if here:
            computed.append(step)
    place = {} if kind == "step" else {"block_list": "blocks", "start": 0, "stop": 4}
    return {"kind": kind, "cells": "".join(cells), "taps": taps, **place}


@settings(max_examples=100, deadline=None)
@given(row=rows())
def test_load_of_save_is_the_same_plan(
    tmp_path_factory: pytest.TempPathFactory, row: dict[str, Any]
) -> None:
    plan = Plan.from_dict(plan_dict(units=[row]))
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan
    assert Plan.from_dict(plan.to_dict()) == plan


def test_a_row_is_one_line_of_the_file(tmp_path: Path) -> None:
    Plan.from_dict(plan_dict()).save(tmp_path / "plan.json")
    lines = (tmp_path / "plan.json").read_text().splitlines()
    assert '   "cells": "##0#00",' in lines
    assert any(line.strip().startswith('"sigmas": [ 1.0, 0.8') for line in lines)


def test_rows_are_resolved_to_step_numbers() -> None:
    plan = Plan.from_dict(plan_dict())
    step = plan.schedules["step"]
    assert step.computed == (True, True, False, True, False, False) == plan.run_steps
    assert step.cached == (False, False, True, False, True, True)
    assert step.anchor == (-1, -1, 1, -1, 3, 3)
    assert step.reads == ((), ((0, 0.5),), (), ((1, 0.7), (0, -0.2)), (), ())
    assert step.last_use == (3, 3, -1, -1, -1, -1)
    group = plan.schedules["blocks[0:4]"]
    # The published predictor: (0.4 - 0.8) / (0.8 - 1.0) times the difference of steps 1 and 0.
    assert [source for source, _ in group.reads[3]] == [0]
    assert group.reads[3][0][1] == pytest.approx(2.0)
    assert group.anchor == (-1, -1, -1, 1, -1, -1)
    assert group.last_use == (3, 3, -1, -1, -1, -1)
    assert plan.schedules["blocks[4:8]"].reads[3] == ()


def test_taps_of_a_group_count_its_computed_steps() -> None:
    row = GROUP | {"cells": "#0##40", "taps": [[], [], [], [], [0.5, 0.0, 0.25], []]}
    # The anchor of step 4 is 3; behind it lie 2 and 0, so that a third tap is one too many.
    with pytest.raises(PlanError, match=r"taps\[4\] has 3 taps"):
        Plan.from_dict(plan_dict(units=[row]))
    row = GROUP | {"cells": "#0##30", "taps": [[], [], [], [], [0.5, 0.25], []]}
    schedule = Plan.from_dict(plan_dict(units=[row])).schedules["blocks[0:4]"]
    assert schedule.reads[4] == ((2, 0.5), (0, 0.25))
    assert schedule.last_use == (4, -1, 4, 5, -1, -1)


def test_cache_bytes_count_what_is_held_at_the_worst_step() -> None:
    plan = Plan.from_dict(plan_dict())
    held = peak_bytes(plan.schedules, {"blocks[0:4]": 100, "blocks[4:8]": 1000}, 10, 5)
    # Step 2: the step unit holds u_0, u_1, m_1 and the outputs, the groups r_0, r_1 and r_1.
    assert held == 3 * 10 + 5 + 2 * 100 + 1000


def test_summary_shows_grid_and_figures() -> None:
    text = Plan.from_dict(plan_dict()).summary()
    for part in ("##0#00", "##.1..", "2.00x", "40.0 dB", "39.0", "gap 10.00 %", "0.500"):
        assert part in text


def units(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"units": list(rows)}


def taps(**at: list[float]) -> list[list[float]]:
    return [at.get(f"t{step}", []) for step in range(6)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "schema_version 2.*upgrade"),
        ({"schema_version": True}, "schema_version True"),
        ({"schema_version": 1.0}, "schema_version 1.0"),
        ({"surprise": 1}, "plan.surprise"),
        ({"sigmas": [1.0] * 7}, "sigmas"),
        ({"sigmas": [1.0, float("nan"), 0.0]}, "sigmas\\[1\\]"),
        ({"branches": 0}, "branches"),
        ({"budget": {}}, "exactly one"),
        ({"asked": {"solver": "best"}}, "asked.*'best'"),
        ({"asked": {"surprise": 1}}, "asked.surprise"),
        ({"asked": {"forced": ["x"]}}, "asked.forced"),
        ({"provenance": {"x": float("nan")}}, "provenance.x is nan"),
        ({"provenance": {"x": {1}}}, "provenance.x is a set"),
        ({"setting": {"x": "\ud800"}}, "Unicode"),
        ({"setting": {"\udfff": 1}}, "Unicode"),
        ({"generator": "\ud800"}, "generator"),
        ({"\ud800": 1}, "plan"),
        (units({**STEP, "cells": "#####"}), "5 cells for 6"),
        (units({**STEP, "cells": "0#####"}), "cells\\[0\\] is '0'"),
        (units({**STEP, "cells": "##!###"}), "cells\\[2\\] is '!'"),
        (units({**STEP, "cells": "##1###"}), "cells\\[2\\] is '1'"),
        (units({**STEP, "cells": "##.###"}), "cells\\[2\\] is '.'"),
        (units({**STEP, "gains": [0.0] * 6}), "gains"),
        (units({**STEP, "taps": [[]] * 5}), "5 rows for 6 cells"),
        (units({**STEP, "taps": taps(t0=[0.1])}), r"taps\[0\] has 1 taps.*0 can be"),
        (units({**STEP, "taps": taps(t1=[0.1, 0.2])}), r"taps\[1\] has 2 taps.*1 can be"),
        (units({**STEP, "taps": taps(t1=[1e39])}), r"taps\[1\].*1e\+39"),
        (units({**STEP, "taps": taps(t2=[1.7e308, 1.7e308])}), r"taps\[2\].*inf"),
        (units({**STEP, "taps": taps(t1=[float("inf")])}), "finite"),
        (units({**STEP, "cells": "##0###", "taps": taps(t2=[1.0])}), r"taps\[2\] has 1 taps"),
        (units({**GROUP, "taps": taps(t2=[1.0])}), r"taps\[2\] has 1 taps"),
        (units({**GROUP, "cells": "#0####", "taps": taps(t1=[1.0])}), r"taps\[1\] has 1 taps"),
        (units({**GROUP, "cells": "##2###", "taps": taps(t2=[1.0])}), "span 2.*reach 1"),
        (units({**GROUP, "cells": "##1###", "taps": taps(t2=[0.0])}), "span 1.*reach 0"),
        (units({**GROUP, "cells": "##5###"}), "span 5.*not computed"),
        (units({**GROUP, "cells": "#0#1##"}), "span 1.*step 1.*not computed"),
        (
            units({**GROUP, "cells": "##1###"})
            | {"sigmas": [1.0, 1.0 - 1e-9, 0.6, 0.4, 0.3, 0.2, 0]},
            "cells\\[2\\].*add up to",
        ),
        (units({**GROUP, "stop": 9}), "not in model.block_lists"),
        (units({**GROUP, "stop": 0}), "are none"),
        (units(GROUP, {**GROUP, "start": 3, "stop": 8}), "overlaps"),
        (units(STEP, STEP), "more than one step unit"),
        (units({**STEP, "cells": "##0###"}, GROUP), "a group is idle"),
        (units({**GROUP, "cells": "##.###"}), "a group is idle"),
        (units({**GROUP, "kind": "block"}), "kind"),
    ],
)
def test_wrong_plans_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        Plan.from_dict(plan_dict(**changes))
    str(caught.value).encode()


@pytest.mark.parametrize("missing", ["asked", "units", "predicted", "certificate", "model"])
def test_what_is_required_is_missed(missing: str) -> None:
    data = plan_dict()
    del data[missing]
    with pytest.raises(PlanError, match=missing):
        Plan.from_dict(data)


def test_options_that_a_plan_was_asked_with_come_back() -> None:
    asked = Options(solver="dp", units="groups", forced=(2,), max_gap=3, predictor="published")
    plan = Plan.from_dict(plan_dict()).model_copy(update={"asked": asked})
    assert Plan.from_dict(plan.to_dict()).asked == asked


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 10_000))
def test_a_truncated_file_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "plan.json"
    Plan.from_dict(plan_dict()).save(path)
    whole = path.read_text().rstrip()
    path.write_text(whole[: cut % len(whole)])
    with pytest.raises(PlanError):
        Plan.load(path)


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "null", '{"schema_version": 1}', "[" * 100_000, '{"a": NaN}', "\x00"]
)
def test_foreign_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match=r"plan\.json"):
        Plan.load(tmp_path / "plan.json")


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no such plan file"):
        Plan.load(tmp_path / "none.json")
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00garbage")
    with pytest.raises(PlanError, match="not a whole plan file"):
        Plan.load(tmp_path / "plan.json")
    (tmp_path / "huge.json").write_bytes(b" " * (17 * 2**20))
    with pytest.raises(PlanError, match="are no plan"):
        Plan.load(tmp_path / "huge.json")


def test_check_is_hard_on_the_model_and_soft_on_the_setting() -> None:
    plan = Plan.from_dict(plan_dict())
    model = plan.model.model_dump()
    assert plan.check(model, {"dtype": "float32", "unknown": 1}) == []
    assert plan.check(model, {"dtype": "bfloat16"}) == [
        "dtype is 'float32' in the plan and 'bfloat16' here"
    ]
    for name, value in (
        ("class_name", "N"),
        ("block_lists", {"blocks": 9}),
        ("architecture", "y"),
    ):
        with pytest.raises(ModelMismatchError, match=name):
            plan.check({**model, name: value})


@pytest.mark.parametrize("value", ["1.37x", " 2X ", 0.73, "0.73", Budget(speedup=3)])
def test_budgets_that_can_be_read(value: Any) -> None:
    budget = Budget.parse(value)
    assert sum(value is not None for value in budget.model_dump().values()) == 1


@pytest.mark.parametrize(
    "value", ["fast", "", "x", "0.5x", 0, -1, "150%", "nan", "infx", "nanx", "dB", "40dB@"]
)
def test_budgets_that_cannot_be_read(value: Any) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        Budget.parse(value)


def test_the_file_is_plain_json_without_nan(tmp_path: Path) -> None:
    Plan.from_dict(plan_dict()).save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["units"][0]["cells"] == "##0#00"
