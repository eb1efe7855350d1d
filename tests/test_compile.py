"""`compile_plan`: budgets, options, certificates, and verification of what it writes."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layercache.figures import restate
from layercache.solver.multistep import DEPTH
from layercache.solver.verify import Row, Rules, VerificationError, verify

from layercache import Budget, BudgetError, CalibrationStats, LayerCacheError, Plan, compile_plan
from layercache.compile import pareto
from layercache.errors import StatsError
from layercache.options import Options
from layercache.plan import IDLE, REFRESH
from layercache.solver.solution import ScheduleSolution
from tests.prediction.strategies import random_stats
from tests.solver.multistep_oracle import turned_error

# The package exports a function of a like name, so the module is asked for by its own.
compile_module = importlib.import_module("layercache.compile")

UNITS = [("step",), ("groups",), ("step", "groups")]


def rows_of(stats: CalibrationStats, plan: Plan) -> list[Row]:
    number = {group.name: index for index, group in enumerate(stats.groups)}
    return [
        Row(
            group=number.get(unit.name),
            refresh=plan.schedules[unit.name].refresh,
            anchor=plan.schedules[unit.name].anchor,
            base=plan.schedules[unit.name].base,
            weight=plan.schedules[unit.name].weight,
            taps=plan.schedules[unit.name].taps,
        )
        for unit in plan.units
    ]


def rules_of(stats: CalibrationStats, share: float, **changes: Any) -> Rules:
    full = stats.num_steps * (float(stats.group_ms.sum()) + stats.rest_ms)
    arguments: dict[str, Any] = {"budget_ms": share * full, "history": 2, "gains": "cell"}
    return Rules(**arguments | changes)


MODES = ["none", "unit", "cell", "trajectory"]


@pytest.mark.parametrize(
    ("units", "gains", "solver"),
    [
        *itertools.product(UNITS, [*MODES, "multistep"], ["dp"]),
        (("groups",), "unit", "greedy"),
        (("step", "groups"), "trajectory", "greedy"),
    ],
)
def test_every_kind_of_plan_keeps_its_budget_and_round_trips(
    units: tuple[str, ...], gains: str, solver: str, tmp_path: Path
) -> None:
    stats = random_stats(0)
    plan = compile_plan(stats, 0.6, units=units, gains=gains, solver=solver)
    assert plan.predicted.compute_share <= 0.6 * (1 + 1e-9)
    assert plan.certificate.lower_bound <= plan.certificate.objective
    assert plan.certificate.solver == solver
    assert [unit.kind for unit in plan.units].count("step") == ("step" in units)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


@settings(max_examples=20)
@given(
    st.integers(0, 10_000),
    st.sampled_from(UNITS),
    st.floats(0.45, 1.0),
    st.integers(1, 3),
    st.sampled_from(["unit", "cell", "trajectory", "multistep"]),
)
def test_verification_accepts_every_plan(
    seed: int, units: tuple[str, ...], share: float, history: int, gains: str
) -> None:
    stats = random_stats(seed, steps=10, groups=2, prompts=3)
    plan = compile_plan(stats, share, units=units, history=history, gains=gains)
    assert Plan.from_dict(plan.to_dict()) == plan
    mode = "unit" if gains == "unit" else "cell"
    found = verify(stats, rows_of(stats, plan), rules_of(stats, share, history=history, gains=mode))
    assert found.broken == ()
    assert found.objective == pytest.approx(plan.certificate.objective)


def mutations(row: Row, steps: int) -> list[tuple[str, dict[str, Any]]]:
    """Changes of one row that each break a rule, with a word of the complaint."""
    cached = [t for t in range(steps) if row.anchor[t] >= 0]
    predicted = [t for t in cached if row.base[t] >= 0]
    found: list[tuple[str, dict[str, Any]]] = []

    def put(name: str, step: int, value: Any) -> dict[str, Any]:
        values = list(getattr(row, name))
        values[step] = value
        return {name: values}

    found.append(("step 0", put("refresh", 0, False)))
    if cached:
        t = cached[-1]
        found.append(("not its last refresh", put("anchor", t, row.anchor[t] + 1)))
        found.append(("idle, but the step is run", put("anchor", t, -1)))
        found.append(("refreshed and has an anchor", put("refresh", t, True)))
    if predicted:
        t = predicted[-1]
        found.append(("base", put("base", t, row.anchor[t])))
        found.append(("weight", put("weight", t, float("nan"))))
        if row.weight[t]:
            found.append(("nothing to multiply", put("base", t, -1)))
    return found


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from(UNITS), st.floats(0.45, 0.8))
def test_verification_rejects_every_broken_rule(
    seed: int, units: tuple[str, ...], share: float
) -> None:
    """Oracle: each change breaks a rule by construction, and the complaint must name it."""
    stats = random_stats(seed, steps=10, groups=2, prompts=3)
    rows = rows_of(stats, compile_plan(stats, share, units=units))
    rules = rules_of(stats, share)
    assert verify(stats, rows, rules).broken == ()
    tried = 0
    for index, row in enumerate(rows):
        for word, change in mutations(row, stats.num_steps):
            changed = [*rows[:index], replace(row, **change), *rows[index + 1 :]]
            result = verify(stats, changed, rules)
            assert any(word in text for text in result.broken), (word, result.broken)
            with pytest.raises(VerificationError, match="This is a bug"):
                result.require()
            tried += 1
    assert tried >= 4


def test_verification_rejects_what_exceeds_a_limit() -> None:
    stats = random_stats(2)
    plan = compile_plan(stats, 0.55)
    rows = rows_of(stats, plan)

    def complaints(**changes: Any) -> str:
        share = changes.pop("share", 0.55)
        return "; ".join(verify(stats, rows, rules_of(stats, share, **changes)).broken)

    assert "more than the budget of" in complaints(share=0.3)
    assert "more than max_cache_bytes=1" in complaints(max_cache_bytes=1)
    assert "0 may be" in complaints(max_gap=0)
    assert "not one of 0 refreshes before" in complaints(history=0)
    cached = next(t for t in range(12) if not rows[0].refresh[t])
    assert "though forced" in complaints(forced=frozenset({cached}))


def test_a_group_that_is_computed_at_a_skipped_step_is_rejected() -> None:
    stats = random_stats(2)
    rows = rows_of(stats, compile_plan(stats, 0.55))
    skipped = next(t for t in range(12) if not rows[0].refresh[t])
    refresh = list(rows[1].refresh)
    refresh[skipped] = True
    broken = verify(
        stats, [rows[0], replace(rows[1], refresh=refresh), *rows[2:]], rules_of(stats, 0.55)
    ).broken
    assert any("refreshed where the step is skipped" in text for text in broken)


def test_a_wrong_figure_is_caught_before_the_plan_is_returned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stats = random_stats(3)
    error = "layercache.compile.trajectory_error"
    monkeypatch.setattr(error, lambda *_: np.full(stats.num_prompts, 1e-9))
    with pytest.raises(VerificationError, match="the plan states psnr_db"):
        compile_plan(stats, 0.5)


def test_a_plan_is_held_to_what_was_asked_and_not_to_what_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A compiler that forgets an option, in the problem and in the plan, is caught."""
    problem_of = compile_module._problem
    monkeypatch.setattr(
        compile_module, "_problem", lambda stats, o: problem_of(stats, replace(o, forced=()))
    )
    plan_of = compile_module._plan
    monkeypatch.setattr(
        compile_module,
        "_plan",
        lambda stats, budget, o, *rest: plan_of(stats, budget, replace(o, forced=()), *rest),
    )
    with pytest.raises(VerificationError, match="is not refreshed, though forced"):
        compile_plan(random_stats(3), 0.4, forced=tuple(range(1, 8, 2)))


def test_speedups_count_what_runs_outside_the_transformer() -> None:
    stats = random_stats(4)
    plan = compile_plan(stats, "1.5x")
    assert plan.predicted.speedup >= 1.5
    full = float(stats.group_ms.sum()) + stats.rest_ms
    total = full + stats.overhead_ms
    spent = plan.predicted.compute_share * full + stats.overhead_ms
    assert plan.predicted.speedup == pytest.approx(total / spent)


@pytest.mark.parametrize("units", UNITS)
def test_a_full_budget_computes_everything_that_has_a_price(units: tuple[str, ...]) -> None:
    plan = compile_plan(random_stats(5), 1.0, units=units)
    assert plan.certificate.objective == 0
    assert all(set(unit.cells) == {"#"} for unit in plan.units)
    assert all(not any(unit.gains or ()) for unit in plan.units)
    assert plan.predicted.psnr_db is None
    assert plan.predicted.cache_bytes == 0


@pytest.mark.parametrize("units", UNITS)
def test_the_tightest_budget_in_the_message_can_be_met(units: tuple[str, ...]) -> None:
    stats = random_stats(6)
    with pytest.raises(BudgetError) as error:
        compile_plan(stats, 0.01, units=units)
    text = str(error.value)
    assert text.startswith("a budget of 0.010 of the compute cannot be met: the tightest")
    share = float(text.split("fraction=")[1].split(")")[0])
    speedup = float(text.split("speedup=")[1].split(")")[0])
    compile_plan(stats, share, units=units)
    compile_plan(stats, Budget(speedup=speedup), units=units)
    with pytest.raises(BudgetError):
        compile_plan(stats, share - 2e-4, units=units)
    with pytest.raises(BudgetError):
        compile_plan(stats, Budget(speedup=speedup + 2e-3), units=units)


@pytest.mark.parametrize("units", UNITS)
def test_a_memory_limit_is_kept_by_the_finished_plan(units: tuple[str, ...]) -> None:
    stats = random_stats(7)
    free = compile_plan(stats, 0.6, units=units)
    limit = int(0.8 * free.predicted.cache_bytes)
    plan = compile_plan(stats, 0.6, units=units, max_cache_bytes=limit)
    assert plan.predicted.cache_bytes <= limit
    assert plan.certificate.lower_bound >= 0


def test_forced_steps_and_gaps_are_kept() -> None:
    plan = compile_plan(random_stats(8), 0.7, forced=(5, 11), max_gap=1)
    for unit in plan.units:
        assert unit.cells[5] == unit.cells[11] == "#"
        row = plan.schedules[unit.name]
        assert all(t - a <= 1 for t, a in enumerate(row.anchor) if a >= 0)


def test_the_published_method_has_its_own_form() -> None:
    plan = compile_plan(random_stats(9), 0.6, solver="greedy", units=("groups",), gains="unit")
    assert plan.step_unit is None
    assert all(unit.gains is None for unit in plan.units)
    assert plan.certificate.gains == "unit"


def test_pareto_is_compile_plan_for_every_budget() -> None:
    stats = random_stats(10)
    shares = [0.9, 0.7, 0.5]
    plans = pareto(stats, shares)
    assert plans == [compile_plan(stats, share) for share in shares]
    assert pareto(stats, []) == []
    only = pareto(stats, [0.7], Options(units=("step",), gains="cell"))[0]
    assert only == compile_plan(stats, 0.7, units=("step",), gains="cell")


def test_another_schedule_is_compiled_by_interpolation() -> None:
    stats = random_stats(11, steps=24, lags=8)
    x = np.linspace(1, 1 / 16, 16)
    sigmas = np.append(2 * x / (1 + x), 0.0)
    plan = compile_plan(stats, 0.6, sigmas=sigmas)
    assert plan.num_steps == 16
    assert plan.sigmas == tuple(sigmas)
    assert plan.provenance["interpolated_from_steps"] == 24
    assert "num_inference_steps" not in plan.setting
    assert "scheduler_shift" not in plan.setting
    same = compile_plan(stats, 0.6, sigmas=stats.sigmas)
    assert [u.cells for u in same.units] == [u.cells for u in compile_plan(stats, 0.6).units]
    assert "interpolated_from_steps" not in compile_plan(stats, 0.6).provenance


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "ilp"}, "solver is 'ilp'; use 'dp' or 'greedy' or 'milp'"),
        ({"units": ("blocks",)}, "units is ('blocks',); use 'step', 'groups' or both"),
        (
            {"gains": "best"},
            "gains is 'best'; use 'none', 'unit', 'cell', 'trajectory' or 'multistep'",
        ),
        ({"history": 9}, "history is 9; 0 to 3 refreshes can be kept"),
    ],
)
def test_unknown_options_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(LayerCacheError) as error:
        compile_plan(random_stats(0), 0.6, **arguments)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"history": 1.5}, "history is 1.5; it must be a whole number"),
        ({"history": None}, "history is None; it must be a whole number"),
        ({"max_gap": "2"}, "max_gap is '2'; it must be a whole number"),
        ({"max_gap": float("nan")}, "max_gap is nan; it must be a whole number"),
        ({"max_cache_bytes": float("inf")}, "max_cache_bytes is inf; it must be a whole number"),
        ({"max_cache_bytes": "1MB"}, "max_cache_bytes is '1MB'; it must be a whole number"),
        ({"forced": 5}, "forced is 5; it must be a sequence"),
        ({"forced": (0.5,)}, "a forced step is 0.5; it must be a whole number"),
        ({"power": "2"}, "power is '2'; it must be a number above 0"),
        ({"power": float("nan")}, "power is nan; it must be finite and above 0"),
        ({"units": None}, "units is None; it must be a sequence"),
        ({"solver": ["dp"]}, "solver is ['dp']; use 'dp' or 'greedy' or 'milp'"),
        ({"sigmas": ["a"]}, "sigmas is ['a']; it must hold T+1 numbers"),
        ({"sigmas": 5}, "sigmas is 5; it must be a sequence"),
    ],
)
def test_options_of_a_wrong_type_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(LayerCacheError) as error:
        compile_plan(random_stats(0), 0.6, **arguments)
    assert str(error.value) == message


def test_numbers_of_numpy_and_whole_floats_are_options_like_any_other(tmp_path: Path) -> None:
    stats = random_stats(0)
    plain = {"history": 1, "max_gap": 3, "forced": (3, 5), "power": 2.0, "max_cache_bytes": 10**6}
    fancy: dict[str, Any] = {
        "history": np.int64(1),
        "max_gap": 3.0,
        "forced": np.array([3, 5]),
        "power": np.float32(2),
        "max_cache_bytes": 1e6,
    }
    plan = compile_plan(stats, np.float64(0.6), units="step", **fancy)
    assert plan == compile_plan(stats, 0.6, units=("step",), **plain)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_a_power_that_takes_prices_out_of_range_is_refused() -> None:
    """Prices that underflow to 0 would make every plan look free."""
    for power in (100, 1e9):
        with pytest.raises(LayerCacheError, match=f"power is {float(power)}.*nearer to 1"):
            compile_plan(random_stats(0), 0.6, power=power)


def test_statistics_whose_median_times_are_zero_are_refused() -> None:
    stats = random_stats(0)
    times = np.zeros_like(stats.times_ms)
    # Every prompt spent time somewhere, and none of the columns has a median above 0.
    times[np.arange(4), np.arange(4)] = 1.0
    with pytest.raises(StatsError, match="0 ms a step"):
        compile_plan(replace(stats, times_ms=times), 0.6)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, "class_name: Field required"),
        ({"block_lists": {"blocks": 2}}, r"blocks\[2:4\]\) is not in model.block_lists"),
        ({"x": 1}, "x: Extra inputs are not permitted"),
    ],
)
def test_statistics_of_a_malformed_model_are_refused(model: dict[str, Any], message: str) -> None:
    stats = random_stats(0)
    changed = {**stats.model, **model} if model else {}
    with pytest.raises(StatsError, match=message):
        compile_plan(replace(stats, model=changed), 0.6)


def straight(stats: CalibrationStats, change: float) -> CalibrationStats:
    """Velocities that are linear in sigma up to float32's rounding, `change` how much they move."""
    start, slope = stats.velocities[:, :1].astype(float), stats.velocities[:, 1:2].astype(float)
    moved = start + change * slope * stats.sigmas[:-1, None]
    return replace(stats, velocities=moved.astype(np.float32))


@pytest.mark.parametrize("gains", ["none", "unit", "cell", "trajectory"])
@pytest.mark.parametrize("change", [0.0, 1e-6, 1e-4, 1e-2, 1.0])
def test_almost_straight_trajectories_are_no_bug(gains: str, change: float) -> None:
    """Their errors are differences of nearly equal numbers, of which rounding is a large part."""
    stats = straight(random_stats(1), change)
    for units in UNITS:
        plan = compile_plan(stats, 0.6, units=units, gains=gains)
        assert plan.certificate.lower_bound <= plan.certificate.objective


def test_a_prompt_without_any_error_does_not_decide_alone() -> None:
    stats = random_stats(1, prompts=5)
    velocities, deltas = stats.velocities.copy(), stats.deltas.copy()
    velocities[0], deltas[0] = 0, 0
    with_still = replace(stats, velocities=velocities, deltas=deltas)
    plan = compile_plan(with_still, 0.6, units=("step",))
    assert plan.certificate.gains == "trajectory"
    assert "nan" not in plan.provenance["gains"]
    still = replace(stats, velocities=0 * stats.velocities, deltas=0 * stats.deltas)
    plan = compile_plan(still, 0.6, units=("step",))
    assert plan.provenance["gains"] in ("per-cell gains: they leave no error", "no cell predicts")


@pytest.mark.parametrize("seed", [0, 1, 3, 5, 7, 25])
def test_the_tightest_budget_in_the_message_is_a_budget(seed: int) -> None:
    """Sums of milliseconds round: full compute comes out above its own share of 1 in four."""
    stats = random_stats(seed, steps=4 + seed % 9, groups=1 + seed % 4, prompts=1, lags=2, size=4)
    with pytest.raises(BudgetError, match=r"fraction=1\.0000\) or Budget\(speedup=1\.000\)"):
        compile_plan(stats, 0.5, max_gap=0)


@pytest.mark.parametrize("limit", [0, 100, 150, 240])
def test_the_budget_that_greedy_names_keeps_the_memory_limit(limit: int) -> None:
    stats = random_stats(0)
    with pytest.raises(BudgetError, match="the tightest found for these") as error:
        compile_plan(stats, 0.05, solver="greedy", max_cache_bytes=limit)
    share = float(str(error.value).split("fraction=")[1].split(")")[0])
    plan = compile_plan(stats, share, solver="greedy", max_cache_bytes=limit)
    assert plan.predicted.cache_bytes <= limit


def test_milp_compiles_the_same_objective_as_dp() -> None:
    stats = random_stats(12, steps=8, groups=2, lags=3)
    plans = [
        compile_plan(stats, 0.6, units=("groups",), gains="cell", solver=name)
        for name in ("dp", "milp")
    ]
    assert plans[0].certificate.objective == pytest.approx(plans[1].certificate.objective, rel=1e-6)


def test_the_chosen_schedule_has_the_least_error_left_out() -> None:
    """Oracle: every candidate fitted by hand."""
    from layercache.figures import budget_ms
    from layercache.solver.gains import fit_gains

    from layercache.compile import _problem
    from layercache.solver.dp import DynamicProgramme

    stats = random_stats(13, prompts=6)
    options = Options()
    candidates = DynamicProgramme(_problem(stats, options)).candidates(
        budget_ms(stats, Budget(fraction=0.6))
    )
    step_ms = stats.group_ms.sum() + stats.rest_ms

    def decibels_too_many(candidate: ScheduleSolution) -> float:
        _, *groups = candidate.units
        cells = [unit.cached.sum() for unit in groups]
        saved = np.dot(cells, stats.group_ms) / (stats.num_steps * step_ms)
        return float(6 + 40 * saved**2) if saved else 0.0

    parts = [[c for c in candidates if (decibels_too_many(c) > 0) == cached] for cached in (0, 1)]
    near = [c for part in parts for c in part if c.objective <= 2 * min(p.objective for p in part)]
    assert all(parts)
    best = min(near, key=lambda c: fit_gains(stats, c.units).score + decibels_too_many(c) / 10)
    plan = compile_plan(stats, 0.6, gains="trajectory")
    if decibels_too_many(best) > 0:
        assert plan.certificate.objective == best.objective
    else:  # moved on by the polish
        assert all(set(unit.cells) <= {REFRESH, IDLE} for unit in plan.groups)


# -- multistep rows ----------------------------------------------------------------------------


def multistep_plan(seed: int = 0, share: float = 0.5, **options: Any) -> Plan:
    stats = random_stats(seed, steps=16, groups=2, prompts=4)
    return compile_plan(stats, share, units=("step",), **options)


def test_a_plan_of_whole_steps_is_a_multistep_method_by_default() -> None:
    plan = multistep_plan()
    assert plan.certificate.gains == "multistep" and plan.schema_version == 2
    unit = plan.step_unit
    assert unit is not None and unit.gains is None and unit.taps is not None
    assert 1 <= max(map(len, unit.taps)) <= DEPTH
    older = multistep_plan(gains="trajectory")
    assert older.schema_version == 1
    assert older.run_steps == plan.run_steps
    assert older.certificate.objective == pytest.approx(plan.certificate.objective)


def test_predicted_figures_of_a_multistep_plan_are_those_of_its_taps() -> None:
    stats = random_stats(0, steps=16, groups=2, prompts=4)
    plan = compile_plan(stats, 0.5, units=("step",))
    unit = plan.step_unit
    assert unit is not None and unit.taps is not None
    final = turned_error(stats, plan.run_steps, unit.taps)
    psnr = -10 * np.log10(stats.image_gain * final)
    assert plan.predicted.psnr_db == pytest.approx(psnr.mean(), abs=1e-4)
    assert plan.predicted.psnr_worst_db == pytest.approx(psnr.min(), abs=1e-4)


def test_few_bytes_leave_room_for_fewer_earlier_outputs() -> None:
    free = multistep_plan()
    depths = set()
    for limit in range(free.predicted.cache_bytes, 0, -8):
        try:
            plan = multistep_plan(max_cache_bytes=limit)
        except BudgetError:
            break
        assert plan.predicted.cache_bytes <= limit
        unit = plan.step_unit
        assert unit is not None
        depths.add(0 if unit.taps is None else max(map(len, unit.taps)))
    assert len(depths) > 1


def test_rows_that_are_predicted_to_do_harm_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layercache.taps.MOST_LOSS_DB", -1000.0)
    plan = multistep_plan()
    assert plan.certificate.gains == "trajectory" and plan.schema_version == 1


def test_without_history_nothing_is_predicted() -> None:
    plan = multistep_plan(history=0)
    assert all(unit.taps is None for unit in plan.units)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda taps: (((0, 0.5),), *taps[1:]), "reads step 0, not one of 4 refreshes"),
        (lambda taps: (*taps[:-1], ((0, 0.5),)), "not one of 4 refreshes before a refresh"),
        (lambda taps: tuple(tuple((s, np.nan) for s, _ in row) for row in taps), "of nan"),
        (lambda taps: taps[:-1], "lists of taps for 16 steps"),
    ],
)
def test_verification_sees_wrong_taps(change: Any, complaint: str) -> None:
    stats = random_stats(0, steps=16, groups=2, prompts=4)
    plan = compile_plan(stats, 0.5, units=("step",))
    (row,) = rows_of(stats, plan)
    assert row.taps is not None
    found = verify(stats, [replace(row, taps=change(row.taps))], rules_of(stats, 0.5))
    assert any(complaint in broken for broken in found.broken), found.broken


def test_cache_bytes_of_a_multistep_plan_are_those_of_its_cells() -> None:
    stats = random_stats(0, steps=16, groups=2, prompts=4)
    plan = compile_plan(stats, 0.5, units=("step",))
    held = plan.cache_bytes({}, stats.velocity_bytes, stats.output_bytes)
    assert plan.predicted.cache_bytes == held


@pytest.mark.parametrize(("seed", "options"), [(3, {}), (16, {"max_gap": 2})])
def test_a_searched_schedule_keeps_to_what_was_asked(
    seed: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = multistep_plan(seed, **options)
    monkeypatch.setattr("layercache.compile.MultistepSearch.better", lambda *_: None)
    plain = multistep_plan(seed, **options)
    assert plan.certificate.gains == "multistep"
    assert plan.run_steps != plain.run_steps
    assert plan.predicted.compute_share == pytest.approx(plain.predicted.compute_share)
    assert plan.certificate.lower_bound <= plan.certificate.objective
    gaps = np.diff(np.flatnonzero([*plan.run_steps, True]))
    assert gaps.max() <= options.get("max_gap", 12) + 1


@pytest.mark.parametrize("prompts", [1, 2])
def test_few_prompts_still_make_a_plan(prompts: int) -> None:
    stats = random_stats(0, steps=16, groups=2, prompts=prompts)
    plan = compile_plan(stats, 0.5, units=("step",))
    assert (plan.certificate.gains == "multistep") == (prompts > 1)
    assert plan.predicted.psnr_db is not None


def test_a_prompt_that_stands_still_does_not_decide_the_rows() -> None:
    stats = random_stats(0, steps=16, groups=2, prompts=4)
    still = stats.velocities.copy()
    still[1] = still[1, :1]
    plan = compile_plan(replace(stats, velocities=still), 0.5, units=("step",))
    others = compile_plan(stats, 0.5, units=("step",))
    assert plan.predicted.compute_share <= 0.5
    assert all(np.isfinite(unit.taps[-1]).all() for unit in plan.units if unit.taps)
    assert others.certificate.gains == "multistep"


def test_one_computed_step_leaves_nothing_to_fit() -> None:
    stats = random_stats(0, steps=3, groups=1, lags=2, prompts=3)
    plan = compile_plan(stats, 0.34, units=("step",))
    assert plan.run_steps == (True, False, False)
    assert plan.schema_version == 1


def test_a_multistep_plan_for_other_sigmas_is_restated_alike() -> None:
    stats = random_stats(0, steps=16, groups=2, prompts=4)
    sigmas = np.interp(np.linspace(0, 16, 13), np.arange(17), stats.sigmas)
    plan = compile_plan(stats, 0.5, units=("step",), sigmas=sigmas)
    assert plan.certificate.gains == "multistep"
    again = restate(stats, plan, plan.units)
    assert again.predicted.psnr_db == pytest.approx(plan.predicted.psnr_db)
    assert again.predicted.cache_bytes == plan.predicted.cache_bytes


def test_a_unit_plan_is_not_refined_under_another_pricing_rule() -> None:
    from layercache.refine import refine_plan

    plan = multistep_plan(gains="unit")
    stats = random_stats(0, steps=16, groups=2, prompts=4)
    with pytest.raises(LayerCacheError, match="nothing to refine"):
        refine_plan(None, plan, stats, ["a", "b"])


def test_rows_below_the_bound_are_refused() -> None:
    stats = random_stats(0, steps=16, groups=2, prompts=4)
    plan = compile_plan(stats, 0.5, units=("step",))
    bound = 2 * plan.certificate.objective
    wrong = plan.certificate.model_copy(update={"lower_bound": bound})
    with pytest.raises(VerificationError, match="below the plan's lower bound"):
        restate(stats, plan.model_copy(update={"certificate": wrong}), plan.units)
