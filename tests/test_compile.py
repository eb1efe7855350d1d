"""`compile_plan`: budgets, options, certificates, and verification of what it writes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layercache import Budget, BudgetError, CalibrationStats, LayerCacheError, Plan, compile_plan
from layercache._fit_rows import rows_of
from layercache.compile import Compiler, pareto
from layercache.errors import OptionError, StatsError
from layercache.options import PREDICTORS, SOLVERS, Options
from layercache.plan import COMPUTED, Certificate
from layercache.prediction import DEPTH, ErrorModel, predicted_psnr
from layercache.verify import VerificationError, verify
from tests.prediction.oracle import random_table
from tests.prediction.strategies import random_stats

UNITS = [("step",), ("groups",), ("step", "groups")]


def depth_of(plan: Plan) -> int:
    return max((len(row) for unit in plan.units for row in unit.taps or ()), default=0)


@pytest.mark.parametrize(
    ("units", "predictor", "solver"), list(itertools.product(UNITS, PREDICTORS, SOLVERS))
)
def test_every_kind_of_plan_keeps_its_budget_and_round_trips(
    units: tuple[str, ...], predictor: str, solver: str, tmp_path: Path
) -> None:
    stats = random_stats(0, steps=9 if solver == "milp" else 12)
    plan = compile_plan(stats, 0.6, units=units, predictor=predictor, solver=solver)
    assert plan.predicted.compute_share <= 0.6 * (1 + 1e-9)
    assert plan.asked == Options(units=units, predictor=predictor, solver=solver)
    assert plan.certificate.solver == solver
    assert plan.certificate.objective == ("score" if solver == "search" else "prices")
    assert predictor != "reuse" or depth_of(plan) == 0
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 500),
    skips=st.booleans(),
    predictor=st.sampled_from(PREDICTORS),
    mode=st.sampled_from(["replay", "residual"]),
    scheduler=st.sampled_from([None, "UniPCMultistepScheduler"]),
)
def test_what_is_predicted_of_any_schedule_is_verified(
    seed: int, skips: bool, predictor: str, mode: str, scheduler: str | None
) -> None:
    """Oracle: `verify`, which shares no code with the error model."""
    setting = {} if scheduler is None else {"scheduler": scheduler}
    stats = random_stats(seed % 5, steps=10, groups=2, lags=4, mode=mode, setting=setting)
    if scheduler is not None:
        stats = replace(stats, latents=1.1 * stats.latents)
    options = Options(predictor=predictor, units=("step", "groups"))
    fit = ErrorModel(stats, predictor).fit(random_table(seed, 10, 2, skips=skips))
    plan = Plan.of(
        stats,
        Budget(fraction=1.0),
        options,
        rows_of(stats, options, fit),
        psnr=predicted_psnr(stats, fit.error),
        certificate=Certificate(solver="search", objective="score", value=fit.score),
    )
    found = verify(stats, plan)
    assert found.error == pytest.approx(fit.error, rel=1e-6)


@pytest.mark.parametrize(
    "figure",
    ["speedup", "compute_share", "cache_bytes", "psnr_db", "psnr_median_db", "psnr_worst_db"],
)
def test_a_wrong_figure_is_caught(figure: str) -> None:
    stats = random_stats(3)
    plan = compile_plan(stats, 0.5)
    value = getattr(plan.predicted, figure)
    changed = plan.predicted.model_copy(update={figure: value + 1})
    with pytest.raises(VerificationError, match=f"{figure} = "):
        verify(stats, plan.model_copy(update={"predicted": changed}))


@pytest.mark.parametrize("solver", ["dp", "search"])
def test_a_wrong_certificate_is_caught(solver: str) -> None:
    stats = random_stats(3)
    plan = compile_plan(stats, 0.5, units="groups", solver=solver)
    wrong = plan.certificate.model_copy(update={"value": 1.01 * plan.certificate.value})
    with pytest.raises(VerificationError, match=r"certificate\.value"):
        verify(stats, plan.model_copy(update={"certificate": wrong}))
    high = plan.certificate.model_copy(update={"lower_bound": abs(plan.certificate.value) + 1})
    with pytest.raises(VerificationError, match="lower bound"):
        verify(stats, plan.model_copy(update={"certificate": high}))


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"forced": tuple(range(12))}, "though forced"),
        ({"max_gap": 0}, "from its anchor; 0 may be"),
        ({"units": ("groups",)}, "step at step .* is cached; units are"),
        ({"max_cache_bytes": 1}, "more than max_cache_bytes=1"),
        ({"sigmas": np.linspace(1, 0, 9)}, "not of one schedule"),
    ],
)
def test_a_plan_is_held_to_what_was_asked(asked: dict[str, Any], complaint: str) -> None:
    stats = random_stats(3)
    plan = compile_plan(stats, 0.4, units=("step",))
    with pytest.raises(VerificationError, match=complaint):
        verify(stats, plan.model_copy(update={"asked": Options(**asked)}))


def test_a_plan_over_its_budget_is_caught() -> None:
    stats = random_stats(3)
    plan = compile_plan(stats, 0.5)
    with pytest.raises(VerificationError, match="more than the budget"):
        verify(stats, plan.model_copy(update={"budget": Budget(fraction=0.3)}))


def test_taps_that_read_another_segment_or_what_was_not_measured_are_caught() -> None:
    stats = random_stats(3, lags=3)
    plan = compile_plan(stats, 0.5)
    segments = np.arange(12.0)
    with pytest.raises(VerificationError, match="of another segment"):
        verify(replace(stats, segments=segments), plan)
    groups = compile_plan(stats, 0.6, units="groups")
    with pytest.raises(VerificationError, match="1 were measured"):
        verify(replace(stats, deltas=stats.deltas[:, :, :, :1]), groups)


def test_speedups_count_what_runs_outside_the_transformer() -> None:
    stats = random_stats(4)
    plan = compile_plan(stats, "1.5x")
    assert plan.predicted.speedup >= 1.5
    full = float(stats.group_ms.sum()) + stats.rest_ms
    spent = plan.predicted.compute_share * full + stats.overhead_ms
    assert plan.predicted.speedup == pytest.approx((full + stats.overhead_ms) / spent)


@pytest.mark.parametrize("solver", ["search", "dp", "greedy"])
@pytest.mark.parametrize("units", UNITS)
def test_a_full_budget_computes_everything(units: tuple[str, ...], solver: str) -> None:
    plan = compile_plan(random_stats(5), 1.0, units=units, solver=solver)
    assert all(set(unit.cells) == {COMPUTED} for unit in plan.units)
    assert depth_of(plan) == 0
    assert plan.certificate.value == 0
    assert plan.predicted.psnr_db is None
    assert plan.predicted.cache_bytes == 0


@pytest.mark.parametrize("solver", ["search", "dp"])
@pytest.mark.parametrize("units", UNITS)
def test_the_tightest_budget_in_the_message_can_be_met(units: tuple[str, ...], solver: str) -> None:
    stats = random_stats(6)
    with pytest.raises(BudgetError, match=r"0\.010 of the compute cannot be met") as error:
        compile_plan(stats, 0.01, units=units, solver=solver)
    share, speedup = named(error.value)
    compile_plan(stats, share, units=units, solver=solver)
    compile_plan(stats, Budget(speedup=speedup), units=units, solver=solver)
    with pytest.raises(BudgetError):
        compile_plan(stats, share - 2e-4, units=units, solver=solver)


def named(error: BudgetError) -> tuple[float, float]:
    """The share and the speedup that a message names."""
    text = str(error)
    share = float(text.split("fraction=")[1].split(")")[0])
    return share, float(text.split("speedup=")[1].split(")")[0])


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("solver", ["search", "dp"])
def test_a_memory_limit_is_kept_by_the_finished_plan(units: tuple[str, ...], solver: str) -> None:
    stats = random_stats(7)
    free = compile_plan(stats, 0.6, units=units, solver=solver)
    depths = set()
    for share in (0.9, 0.7, 0.5, 0.3):
        limit = int(share * free.predicted.cache_bytes)
        try:
            plan = compile_plan(stats, 0.6, units=units, solver=solver, max_cache_bytes=limit)
        except BudgetError:
            continue
        assert plan.predicted.cache_bytes <= limit
        depths.add(depth_of(plan))
    assert min(depths) < depth_of(free) <= DEPTH


@pytest.mark.parametrize("solver", ["search", "dp", "greedy"])
def test_forced_steps_and_gaps_are_kept(solver: str) -> None:
    plan = compile_plan(random_stats(8), 0.7, forced=(5, 11), max_gap=1, solver=solver)
    for unit in plan.units:
        assert unit.cells[5] == unit.cells[11] == COMPUTED
        row = plan.schedules[unit.name]
        assert all(t - a <= 1 for t, a in enumerate(row.anchor) if a >= 0)


def test_the_published_method_has_its_own_form() -> None:
    plan = compile_plan(
        random_stats(9), 0.6, solver="greedy", units=("groups",), predictor="published"
    )
    assert plan.step_unit is None
    assert all(unit.taps is None for unit in plan.units)
    assert set("".join(unit.cells for unit in plan.units)) - {"#", "0"}


def test_groups_alone_have_taps_of_their_own_and_of_the_step() -> None:
    plan = compile_plan(random_stats(9, lags=6), 0.5, units=("groups",))
    step = plan.step_unit
    assert step is not None and set(step.cells) == {COMPUTED} and step.taps is not None
    assert max(map(len, step.taps)) == DEPTH
    assert max(len(row) for unit in plan.groups for row in unit.taps or ()) > 1


def test_pareto_is_compile_plan_for_every_budget() -> None:
    stats = random_stats(10)
    shares = [0.7, 0.9, 0.5]
    assert pareto(stats, shares) == [compile_plan(stats, share) for share in shares]
    assert pareto(stats, []) == []
    options = Options(units=("step",), solver="dp")
    assert pareto(stats, [0.7], options)[0] == compile_plan(
        stats, 0.7, units=("step",), solver="dp"
    )


def test_groups_alone_start_from_schedules_of_whole_steps() -> None:
    """With all groups cached where those skip a step; the plan is at least as good."""
    stats = random_stats(5, steps=14)
    compiler = Compiler(stats, Options(units=("groups",)))
    ((_, search),) = compiler._searches
    limit = search.budgets_ms[4 * search.effort.parts - 1]
    proposed = [table for table in search.propose(limit) if search.table.fits(table, limit)]
    at_once = [t for t in proposed if (t[:, 1:] == t[:, 1:2]).all() and not t[:, 1].all()]
    assert at_once and all(table[:, 0].all() for table in at_once)
    best = search.best(limit)
    assert best is not None and best.score <= min(search.score(table) for table in at_once)


def test_groups_that_take_no_time_are_no_error_of_ours() -> None:
    """Caching them saves nothing: only full compute can be met."""
    stats = random_stats(5, steps=10)
    times = stats.times_ms.copy()
    times[:, :-2] = 0
    idle = replace(stats, times_ms=times)
    with pytest.raises(BudgetError, match="cannot be met"):
        compile_plan(idle, 0.5, units=("groups",))
    assert compile_plan(idle, 1.0, units=("groups",)).predicted.compute_share == 1.0


@pytest.mark.parametrize("units", UNITS)
def test_a_larger_budget_is_never_foretold_worse_and_is_used(units: tuple[str, ...]) -> None:
    stats = random_stats(11, steps=16, prompts=5)
    shares = np.linspace(0.4, 1.0, 25)
    last = -np.inf
    for share, plan in zip(shares, pareto(stats, list(shares), Options(units=units)), strict=True):
        psnr = np.inf if plan.predicted.psnr_db is None else plan.predicted.psnr_db
        assert psnr >= last
        gained, last = psnr > last, psnr
        # To the nearest whole step, or to the nearest cell of a group.
        step = 1 / 16 if "step" in units else 0.03 * share + 1 / 48
        assert not gained or plan.predicted.compute_share >= share - step - 1e-9


def test_progress_is_told() -> None:
    seen: list[tuple[int, int]] = []
    compile_plan(
        random_stats(0), 0.5, units="step", progress=lambda level, of: seen.append((level, of))
    )
    assert seen == [(level, 12) for level in range(1, 7)]


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
    assert verify(stats, plan).compute_share == pytest.approx(plan.predicted.compute_share)
    same = compile_plan(stats, 0.6, sigmas=stats.sigmas)
    assert [u.cells for u in same.units] == [u.cells for u in compile_plan(stats, 0.6).units]


# -- steps that differ -------------------------------------------------------------------------


def two_experts() -> CalibrationStats:
    """The first four of twelve steps are made elsewhere; the last three have half the calls."""
    loads = np.ones((12, 4))
    loads[:4], loads[9:] = 0.0, 0.5
    segments = np.array([0.0] * 4 + [1.0] * 5 + [2.0] * 3)
    return random_stats(12, loads=loads, segments=segments)


@pytest.mark.parametrize("solver", ["search", "dp", "greedy"])
@pytest.mark.parametrize("units", UNITS)
def test_steps_of_another_expert_are_neither_skipped_nor_counted(
    units: tuple[str, ...], solver: str
) -> None:
    stats = two_experts()
    plan = compile_plan(stats, 0.7, units=units, solver=solver)
    assert all(unit.cells.startswith(COMPUTED * 5) for unit in plan.units)
    assert all(unit.cells[9] == COMPUTED for unit in plan.units)
    step = plan.step_unit
    if step is not None and units == ("step",):
        whole = [1.0 if 4 <= t < 9 else 0.5 if t >= 9 else 0.0 for t in range(12)]
        spent = sum(cost for cost, cell in zip(whole, step.cells, strict=True) if cell == COMPUTED)
        assert plan.predicted.compute_share == pytest.approx(spent / sum(whole))
    for name, schedule in plan.schedules.items():
        for t, pairs in enumerate(schedule.reads):
            assert all(stats.segments[s] == stats.segments[t] for s, _ in pairs), name


# -- options and statistics that are refused ----------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ({"solver": "magic"}, "magic"),
        ({"solver": ["dp"]}, "dp"),
        ({"units": ("blocks",)}, "blocks"),
        ({"units": ()}, r"\(\)"),
        ({"units": None}, "None"),
        ({"predictor": "best"}, "best"),
        ({"max_gap": "2"}, "'2'"),
        ({"max_gap": -1}, "-1"),
        ({"max_gap": float("nan")}, "nan"),
        ({"max_cache_bytes": float("inf")}, "inf"),
        ({"max_cache_bytes": "1MB"}, "1MB"),
        ({"max_cache_bytes": -1}, "-1"),
        ({"forced": 5}, "5"),
        ({"forced": (0.5,)}, "0.5"),
        ({"forced": (12,)}, "12"),
        ({"forced": (-1,)}, "-1"),
        ({"sigmas": ["a"]}, "'a'"),
        ({"sigmas": 5}, "5"),
    ],
)
def test_wrong_options_are_refused(arguments: dict[str, Any], value: str) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(arguments)).split('_')[0]}.*{value}"):
        compile_plan(random_stats(0), 0.6, **arguments)


def test_numbers_of_numpy_and_whole_floats_are_options_like_any_other(tmp_path: Path) -> None:
    stats = random_stats(0)
    plain: dict[str, Any] = {"max_gap": 3, "forced": (3, 5), "max_cache_bytes": 10**6}
    fancy: dict[str, Any] = {
        "max_gap": 3.0,
        "forced": np.array([3, 5]),
        "max_cache_bytes": 1e6,
    }
    plan = compile_plan(stats, np.float64(0.6), units="step", **fancy)
    assert plan == compile_plan(stats, 0.6, units=("step",), **plain)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


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
        ({}, "class_name"),
        ({"block_lists": {"blocks": 2}}, r"blocks\[2:4\]\) is not in model.block_lists"),
        ({"x": 1}, "x: "),
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
    return replace(stats, velocities=moved.astype(np.float32), latents=np.zeros((0, 0, 0)))


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("change", [0.0, 1e-6, 1e-4, 1e-2, 1.0])
def test_almost_straight_trajectories_are_no_bug(predictor: str, change: float) -> None:
    """Their errors are differences of nearly equal numbers, of which rounding is a large part."""
    stats = straight(random_stats(1), change)
    for units in UNITS:
        plan = compile_plan(stats, 0.6, units=units, predictor=predictor)
        assert plan.predicted.compute_share <= 0.6


def test_a_prompt_without_any_error_does_not_decide_alone() -> None:
    stats = random_stats(1, prompts=5)
    velocities, deltas = stats.velocities.copy(), stats.deltas.copy()
    velocities[0], deltas[0] = 0, 0
    plan = compile_plan(replace(stats, velocities=velocities, deltas=deltas), 0.6)
    assert plan.predicted.compute_share <= 0.6
    still = replace(stats, velocities=0 * stats.velocities, deltas=0 * stats.deltas)
    assert compile_plan(still, 0.6).predicted.psnr_db is None


@pytest.mark.parametrize("prompts", [1, 2])
def test_few_prompts_still_make_a_plan(prompts: int) -> None:
    plan = compile_plan(random_stats(0, steps=16, prompts=prompts), 0.5)
    assert depth_of(plan) > 0 and plan.predicted.psnr_db is not None


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
    plan = compile_plan(stats, named(error.value)[0], solver="greedy", max_cache_bytes=limit)
    assert plan.predicted.cache_bytes <= limit


def test_milp_compiles_the_same_objective_as_dp() -> None:
    stats = random_stats(12, steps=8, groups=2, lags=3)
    plans = [compile_plan(stats, 0.6, units=("groups",), solver=name) for name in ("dp", "milp")]
    values = [plan.certificate.value for plan in plans]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert plans[0].certificate.lower_bound == pytest.approx(values[0])


def test_the_search_is_foretold_no_worse_than_what_solvers_propose() -> None:
    stats = random_stats(13, steps=16, prompts=6)
    for units in UNITS:
        found = compile_plan(stats, 0.6, units=units).predicted.psnr_db
        for solver in ("dp", "greedy"):
            other = compile_plan(stats, 0.6, units=units, solver=solver).predicted.psnr_db
            assert found is not None and other is not None
            # A search looks at quick scores; the plan states a full fit.
            assert found >= other - 1.0


def test_errors_are_of_the_package() -> None:
    assert issubclass(OptionError, LayerCacheError)
    assert issubclass(VerificationError, LayerCacheError)


def without_groups(stats: CalibrationStats) -> CalibrationStats:
    """The same, as if nothing were known of the inside of the transformer."""
    whole = stats.times_ms[:, :-1].sum(axis=1)
    return replace(
        stats,
        groups=(),
        deltas=stats.deltas[:, :, :0],
        responses=np.zeros(0),
        response_sigmas=np.zeros(0),
        loads=stats.loads[:, -1:],
        times_ms=np.column_stack([whole, stats.times_ms[:, -1]]),
        group_bytes=(),
    )


@pytest.mark.parametrize("solver", SOLVERS)
def test_statistics_without_groups_make_the_plans_of_whole_steps(
    solver: str, tmp_path: Path
) -> None:
    stats = random_stats(3, prompts=1, steps=9)
    alone = without_groups(stats)
    alone.save(tmp_path / "stats.npz")
    alone = CalibrationStats.load(tmp_path / "stats.npz")
    expected = compile_plan(stats, 0.6, units=("step",), solver=solver)
    for units in (("step",), ("step", "groups")):
        plan = compile_plan(alone, 0.6, units=units, solver=solver)
        assert plan.units == expected.units
        assert plan.predicted.model_dump() == pytest.approx(expected.predicted.model_dump())
    shorter = compile_plan(alone, 0.6, sigmas=np.linspace(1, 0, 8).tolist())
    assert len(shorter.units) == 1
    with pytest.raises(OptionError, match=r"units is \('groups',\)"):
        compile_plan(alone, 0.6, units=("groups",), solver=solver)
