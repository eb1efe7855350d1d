"""Plan files: equal after a round trip, readable, and refused when anything is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layercache.errors import ModelMismatchError, PlanError
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
            {"kind": "step", "cells": "##1#20", "gains": [0, 0.5, 0.7, 0, 1.1, 0]},
            {"kind": "group", "block_list": "blocks", "start": 0, "stop": 4, "cells": "##.1.."},
            {"kind": "group", "block_list": "blocks", "start": 4, "stop": 8, "cells": "##.0.."},
        ],
        "budget": {"fraction": 0.5},
        "predicted": {
            "speedup": 2.0,
            "compute_share": 0.5,
            "psnr_db": 40.0,
            "psnr_worst_db": 39.0,
            "cache_bytes": 100,
        },
        "certificate": {
            "solver": "dp",
            "gains": "trajectory",
            "power": 1.0,
            "objective": 1.0,
            "lower_bound": 0.9,
            "gap": 0.1,
        },
    }
    return data | changes


@st.composite
def step_rows(draw: st.DrawFn) -> str:
    """Any valid row of the step unit."""
    cells = ["#"]
    refreshes = [0]
    for step in range(1, STEPS):
        reach = refreshes[-1] - refreshes[0]
        symbol = draw(st.sampled_from(["#", *"0123456"[: reach + 1]]))
        cells.append(symbol)
        if symbol == "#":
            refreshes.append(step)
    return "".join(cells)


@settings(max_examples=100, deadline=None)
@given(cells=step_rows(), gain=st.floats(-3, 3))
def test_load_of_save_is_the_same_plan(
    tmp_path_factory: pytest.TempPathFactory, cells: str, gain: float
) -> None:
    gains = [gain if symbol in "123456" else 0.0 for symbol in cells]
    plan = Plan.from_dict(plan_dict(units=[{"kind": "step", "cells": cells, "gains": gains}]))
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan
    assert Plan.from_dict(plan.to_dict()) == plan


def test_a_row_is_one_line_of_the_file(tmp_path: Path) -> None:
    Plan.from_dict(plan_dict()).save(tmp_path / "plan.json")
    lines = (tmp_path / "plan.json").read_text().splitlines()
    assert '   "cells": "##1#20",' in lines
    assert any(line.strip().startswith('"sigmas": [ 1.0, 0.8') for line in lines)


def test_schedules_resolve_anchors_bases_and_weights() -> None:
    plan = Plan.from_dict(plan_dict())
    step = plan.schedules["step"]
    assert step.anchor == (-1, -1, 1, -1, 3, 3)
    assert step.base == (-1, 0, 0, -1, 1, -1)
    # gain 0.7 over (0.6 - 0.8) / (0.8 - 1.0), and gain 1.1 over (0.3 - 0.4) / (0.4 - 0.8)
    assert step.weight == pytest.approx((0, 0.5, 0.7, 0, 1.1 * 0.25, 0))
    group = plan.schedules["blocks[0:4]"]
    assert group.weight[3] == pytest.approx((0.4 - 0.8) / (0.8 - 1.0))
    assert group.last_use == (3, 3, -1, -1, -1, -1)
    assert plan.run_steps == (True, True, False, True, False, False)


def test_cache_bytes_count_what_is_held_at_the_worst_step() -> None:
    plan = Plan.from_dict(plan_dict())
    held = plan.cache_bytes({"blocks[0:4]": 100, "blocks[4:8]": 1000}, 10, 5)
    # Step 2: the step unit holds v_0, v_1 and the outputs, the groups r_0, r_1 and r_1.
    assert held == 2 * 10 + 5 + 2 * 100 + 1000


def test_summary_shows_grid_and_figures() -> None:
    text = Plan.from_dict(plan_dict()).summary()
    for part in ("##1#20", "##.1..", "2.00x", "40.0 dB", "39.0", "gap 10.00 %", "0.500"):
        assert part in text


def units(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"units": list(rows)}


STEP = {"kind": "step", "cells": "######"}
GROUP = {"kind": "group", "block_list": "blocks", "start": 0, "stop": 4, "cells": "######"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 3}, "schema_version 3.*upgrade"),
        ({"schema_version": 2}, "schema_version is 2, but units without taps are of version 1"),
        ({"schema_version": True}, "schema_version True"),
        ({"surprise": 1}, "plan.surprise: Extra inputs"),
        ({"sigmas": [1.0] * 7}, "sigmas must fall strictly"),
        ({"sigmas": [1.0, float("nan"), 0.0]}, "sigmas\\[1\\] is nan, not a finite number"),
        ({"branches": 0}, "branches"),
        ({"budget": {}}, "exactly one"),
        (units({**STEP, "cells": "#####"}), "5 cells for 6"),
        (units({**STEP, "cells": "0#####"}), "first step must be refreshed"),
        (units({**STEP, "cells": "##!###"}), "cells\\[2\\] is '!'"),
        (units({**STEP, "cells": "##5###"}), "span 5, but no refresh lies that far"),
        (units({**STEP, "cells": "##.###"}), "cells\\[2\\] is '.'"),
        (units({**STEP, "gains": [0.0]}), "1 gains for 6 cells"),
        (units({**STEP, "gains": [1.0, 0, 0, 0, 0, 0]}), "after its first refresh"),
        (units({**GROUP, "gains": [0, 1.0, 0, 0, 0, 0]}), "only in the step unit"),
        (units({**GROUP, "cells": "##0###", "gains": [0, 0, 1, 0, 0, 0]}), "plain reuse"),
        (
            units({**STEP, "cells": "##1###", "gains": [0, 0, 1e308, 0, 0, 0]})
            | {"sigmas": [1.0, 0.99, 0.6, 0.4, 0.3, 0.2, 0.0]},
            "cells\\[2\\] has gain 1e.308 and a rise of 39: their product",
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
    with pytest.raises(PlanError, match=message):
        Plan.from_dict(plan_dict(**changes))


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
    assert (budget.fraction is None) != (budget.speedup is None)


@pytest.mark.parametrize("value", ["fast", "", "x", "0.5x", 0, -1, 1.5, "nan", "infx", "nanx"])
def test_budgets_that_cannot_be_read(value: Any) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        Budget.parse(value)


def test_the_file_is_plain_json_without_nan(tmp_path: Path) -> None:
    Plan.from_dict(plan_dict()).save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["units"][0]["cells"] == "##1#20"


STEP_TAPS = {"kind": "step", "cells": "##1#1#", "taps": [[], [], [], [0.9, -0.2], [], [1.1]]}


def tapped(**changes: object) -> dict[str, object]:
    data = plan_dict(units=[STEP_TAPS | changes])
    return data | {"schema_version": 2}


def test_taps_are_resolved_to_steps_and_round_trip(tmp_path: Path) -> None:
    plan = Plan.from_dict(tapped())
    schedule = plan.schedules["step"]
    assert schedule.taps == ((), (), (), ((1, 0.9), (0, -0.2)), (), ((3, 1.1),))
    assert not any(schedule.weight)
    # Step 1 is repeated at step 2 and read by step 3; of step 3 a mean is repeated at step 4.
    assert schedule.last_use == (3, 3, -1, 5, -1, -1)
    assert schedule.last_mixed == (-1, -1, -1, 4, -1, -1)
    assert [schedule.stored_at(step) for step in range(6)] == [1, 2, 2, 4, 2, 1]
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert "multistep" in plan.summary()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gains": [0.0] * 6}, "taps stand in the step unit only, and instead of gains"),
        ({"taps": [[]] * 5}, "5 lists of taps for 6 cells"),
        ({"taps": [[0.1], [], [], [], [], []]}, r"taps\[0\] has 1 coefficients.*0 can be"),
        ({"taps": [[], [], [0.1], [], [], []]}, r"taps\[2\] has 1 coefficients.*0 can be"),
        ({"taps": [[], [0.1, 0.2], [], [], [], []]}, r"taps\[1\] has 2 coefficients.*1 can be"),
        ({"taps": [[], [1e39], [], [], [], []]}, r"taps\[1\] add up to 1e\+39"),
        ({"taps": [[], [], [], [1.7e308, 1.7e308], [], []]}, r"taps\[3\] add up to inf"),
        ({"taps": [[], [float("inf")], [], [], [], []]}, "finite"),
    ],
)
def test_wrong_taps_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_dict(tapped(**changes))


def test_taps_need_the_version_that_has_them() -> None:
    with pytest.raises(PlanError, match="units with taps are of version 2"):
        Plan.from_dict(tapped() | {"schema_version": 1})
