"""Budgets: how they are read, and quality as one."""

from __future__ import annotations

import inspect
import typing
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from layercache import Budget, Plan, compile_plan
from layercache.compile import pareto
from layercache.options import Changes, Options
from layercache.plan import COMPUTED
from layercache.verify import VerificationError, recompute, verify
from tests.prediction.strategies import random_stats


@pytest.mark.parametrize(
    ("value", "budget"),
    [
        ("2x", Budget(speedup=2)),
        ("2", Budget(speedup=2)),
        (2, Budget(speedup=2)),
        ("2.0", Budget(speedup=2)),
        (np.float64(1.5), Budget(speedup=1.5)),
        ("1", Budget(fraction=1)),
        (1.0, Budget(fraction=1)),
        ("1x", Budget(speedup=1)),
        ("50%", Budget(fraction=0.5)),
        ("0.73", Budget(fraction=0.73)),
        ("40dB", Budget(psnr_db=40)),
        (" 40.5 db ", Budget(psnr_db=40.5, quantile=0.5)),
        ("40dB@10%", Budget(psnr_db=40, quantile=0.1)),
        ("40dB@0.1", Budget(psnr_db=40, quantile=0.1)),
        ("40dB@0%", Budget(psnr_db=40, quantile=0)),
    ],
)
def test_short_forms_are_read_and_written(value: float | str, budget: Budget) -> None:
    assert Budget.parse(value) == budget
    assert Budget.parse(budget.text) == budget
    assert eval(repr(budget)) == budget


@pytest.mark.parametrize(
    "fields_given",
    [
        {},
        {"psnr_db": 40, "speedup": 2},
        {"quantile": 0.5},
        {"speedup": 2, "quantile": 0.5},
        {"psnr_db": 0},
        {"psnr_db": 151},
        {"psnr_db": 40, "quantile": 1.1},
    ],
)
def test_a_budget_is_one_thing(fields_given: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Budget(**fields_given)


def kept(plan: Plan, stats: typing.Any, quantile: float) -> float:
    """DB at a quantile, from what `verify` recomputes."""
    error = recompute(stats, plan).error
    with np.errstate(divide="ignore"):
        psnr = -10 * np.log10(stats.image_gain * error)
    return float(np.quantile(np.minimum(psnr, 1e3), quantile))


@pytest.mark.parametrize("solver", ["search", "dp", "greedy"])
@pytest.mark.parametrize("units", [("step",), ("groups",), ("step", "groups")])
def test_a_higher_quality_is_kept_and_never_faster(units: tuple[str, ...], solver: str) -> None:
    stats = random_stats(1, prompts=6, steps=10, groups=2)
    options = Options(units=units, solver=solver)
    for quantile in (0.0, 0.5):
        targets = [Budget(psnr_db=db, quantile=quantile) for db in (5, 20, 30, 40, 50, 149)]
        plans = pareto(stats, targets, options)
        speedups = [plan.predicted.speedup for plan in plans]
        assert speedups == sorted(speedups, reverse=True)
        assert len(set(speedups)) > 3
        for target, plan in zip(targets, plans, strict=True):
            assert plan.budget == target
            assert kept(plan, stats, quantile) >= (target.psnr_db or 0) * (1 - 1e-9)


@pytest.mark.parametrize("units", [("step",), ("step", "groups")])
def test_a_plan_one_level_faster_would_not_keep_it(units: tuple[str, ...]) -> None:
    stats = random_stats(2, steps=16, prompts=5)
    options = Options(units=units)
    for quantile in (0.1, 0.5):
        plan = compile_plan(stats, Budget(psnr_db=35, quantile=quantile), options)
        share = plan.predicted.compute_share
        level = 1 / 16 if units == ("step",) else 1 / 16 / 4
        faster = pareto(stats, [share - level * count for count in (1, 2)], options)
        assert all(kept(other, stats, quantile) < 35 for other in faster)
        # And with the share that it came to, nothing better is found.
        again = compile_plan(stats, share, options)
        assert again.units == plan.units


def test_the_worst_prompt_costs_more_than_the_median() -> None:
    stats = random_stats(3, prompts=8, image_gain=np.geomspace(0.001, 0.5, 8))
    median, worst = pareto(stats, ["40dB", "40dB@0%"])
    assert median.predicted.psnr_median_db is not None and worst.predicted.psnr_worst_db is not None
    assert median.predicted.psnr_median_db >= 40 > (median.predicted.psnr_worst_db or 0)
    assert worst.predicted.psnr_worst_db >= 40
    assert worst.predicted.speedup < median.predicted.speedup
    assert f"{worst.predicted.speedup:.2f}x" in worst.summary().splitlines()[0]


def test_what_no_caching_keeps_computes_everything(tmp_path: Path) -> None:
    plan = compile_plan(random_stats(0), Budget(psnr_db=149))
    assert all(set(unit.cells) == {COMPUTED} for unit in plan.units)
    assert "everything is computed" in plan.summary()
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_an_option_of_memory_is_kept_besides() -> None:
    stats = random_stats(7)
    plan = compile_plan(stats, "35dB", max_cache_bytes=300)
    assert plan.predicted.cache_bytes <= 300
    assert (plan.predicted.psnr_median_db or 1e3) >= 35


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.5, 1.0])
def test_a_quality_that_is_not_kept_is_caught(quantile: float) -> None:
    stats = random_stats(3)
    plan = compile_plan(stats, 0.5)
    found = kept(plan, stats, quantile)
    below = plan.model_copy(update={"budget": Budget(psnr_db=found - 0.01, quantile=quantile)})
    verify(stats, below)
    above = plan.model_copy(update={"budget": Budget(psnr_db=found + 0.01, quantile=quantile)})
    with pytest.raises(VerificationError, match="dB at the quantile"):
        verify(stats, above)


def test_options_have_one_list() -> None:
    assert typing.get_type_hints(Changes) == {
        name: hint
        for name, hint in typing.get_type_hints(Options).items()
        if name in {field.name for field in fields(Options)}
    }
    taken = set(inspect.signature(compile_plan).parameters)
    assert taken == {"stats", "budget", "options", "progress", "changes"}
    stats = random_stats(0)
    both = compile_plan(stats, 0.6, Options(units="step", solver="greedy"), solver="dp")
    assert both.asked == Options(units="step", solver="dp")
