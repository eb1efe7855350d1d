"""The bench on a tiny model: who runs, what is kept, what happens when it is stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.comparison import measuring as measuring_module
from bench.comparison.ablation import run_ablation, subset
from bench.comparison.entrants import Entrant, Family
from bench.comparison.equal_speed import Curve, Point
from bench.comparison.field import FIELD
from bench.comparison.goals import goals
from bench.comparison.inputs import Inputs
from bench.comparison.measuring import BLOCK, Measuring
from bench.comparison.page import bench_page
from bench.comparison.pictures import speed_curves
from bench.comparison.results import ScenarioResult, margins
from bench.comparison.run import run_bench
from bench.comparison.scenario import MAIN, SECOND, BenchSize
from bench.comparison.store import Store, digest, fingerprint
from bench.comparison.tables import markdown, table
from bench.comparison.tuning import Trial, Validation, chosen, tune
from bench.peers.diffusers_caches import DiffusersCache, first_block_cache
from layercache.errors import LayerCacheError
from layercache.evaluation.methods import LayerCache
from layercache.evaluation.peers import FewerSteps, Uniform
from layercache.evaluation.peers.uniform import uniform_steps
from tests.evaluation.test_report import Structure
from tests.test_cli import weights_of

STEPS = 8
TINY = BenchSize(
    calibration=2, validation=2, held_out=3, batch=2, lags=3, targets=(1.5, 2.0), grid=0.1
)
SCENARIO = replace(MAIN, steps=STEPS)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights_of(tmp_path_factory.mktemp("weights"), blocks=4)


@pytest.fixture
def inputs(weights: Path, tmp_path: Path) -> Inputs:
    pipe = SCENARIO.load(weights)
    store = Store(tmp_path / "store", fingerprint(SCENARIO, pipe))
    return Inputs(pipe, SCENARIO, TINY, store, lambda text: None)


def entrants(*counts: int) -> list[Entrant]:
    return [
        Entrant("uniform", f"{count} steps", Uniform(uniform_steps(STEPS, count)))
        for count in counts
    ]


def measuring(inputs: Inputs, **changes: Any) -> Measuring:
    batches = SCENARIO.work("held-out", TINY.held_out, TINY.batch)
    return Measuring(inputs.pipe, inputs.store, batches, **changes)


# Who takes part


def test_every_family_has_entrants_that_share_no_setting(inputs: Inputs) -> None:
    for family in FIELD.values():
        if family.name.startswith("cache-dit"):
            pytest.importorskip("cache_dit")
        found = family.build(inputs)
        assert found, family.name
        assert {entrant.family for entrant in found} == {family.name}
        labels = [entrant.label for entrant in found]
        assert len(set(labels)) == len(labels), family.name


def test_methods_with_a_budget_keep_to_it(inputs: Inputs) -> None:
    counts = TINY.fresh_steps(STEPS)
    for name in ("layercache", "non-stationary", "meancache", "dpcache", "lemica", "uniform"):
        shares = [entrant.method.compute_share for entrant in FIELD[name].build(inputs)]
        assert max(shares) <= max(counts) / STEPS + 1e-9, name
        assert len(set(shares)) > 1, name


def test_what_is_fitted_is_fitted_once(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    first = FIELD["non-stationary"].build(inputs)
    stats = inputs.stats()

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("fitted again")

    monkeypatch.setattr("bench.comparison.field.fit_nonstationary", never)
    monkeypatch.setattr("bench.comparison.inputs.calibrate", never)
    monkeypatch.setattr("bench.comparison.inputs.collect_trajectories", never)
    again = replace(inputs)
    assert FIELD["non-stationary"].build(again) == first
    np.testing.assert_array_equal(again.stats().deltas, stats.deltas)


# Tuning


def trial(share: float, psnr: float, label: str = "") -> Trial:
    entrant = Entrant("m", label or f"{share}", first_block_cache(share))
    return Trial(entrant, share, (psnr, psnr))


def test_the_chosen_are_on_the_front_and_near_the_shares() -> None:
    trials = [trial(0.8, 60), trial(0.7, 65), trial(0.5, 50), trial(0.45, 40), trial(0.3, 45)]
    kept = chosen(trials, [0.7, 0.5, 0.3], foreign=False)
    assert [entrant.label for entrant in kept] == ["0.7", "0.5", "0.3"]


def test_a_setting_that_computed_everything_is_not_chosen() -> None:
    kept = chosen([trial(1.0, 120), trial(0.999, 80), trial(0.6, 50)], [0.9, 0.6], foreign=False)
    assert [entrant.label for entrant in kept] == ["0.6"]
    assert chosen([trial(1.0, 120)], [0.5], foreign=True) == []


def test_foreign_entrants_carry_the_share_that_was_counted() -> None:
    (kept,) = chosen([trial(0.6, 50)], [0.6], foreign=True)
    assert kept.method.compute_share == 0.6


def test_a_foreign_setting_that_fails_is_left_out(inputs: Inputs) -> None:
    class Broken(DiffusersCache):
        def attach(self, pipe: Any) -> Any:
            raise RuntimeError("no such kernel")

    good = Entrant("other", "good", first_block_cache(10.0))
    bad = Entrant("other", "bad", Broken(good.method.config, "broken"))  # type: ignore[attr-defined]
    kept = tune(Validation(inputs), [bad, good], foreign=True)
    assert [entrant.label for entrant in kept] == ["good"]
    with pytest.raises(RuntimeError, match="no such kernel"):
        tune(Validation(inputs), [bad], foreign=True)
    with pytest.raises(RuntimeError, match="no such kernel"):
        tune(Validation(inputs), [bad, good], foreign=False)


# The store


def test_a_value_is_computed_once_and_again_for_another_key(tmp_path: Path) -> None:
    calls = []

    def compute() -> list[int]:
        calls.append(1)
        return [len(calls)]

    store = Store(tmp_path, "a")
    assert store.kept("t", {"k": 1}, compute) == store.kept("t", {"k": 1}, compute) == [1]
    assert store.kept("t", {"k": 2}, compute) == [2]
    assert Store(tmp_path, "b").kept("t", {"k": 1}, compute) == [3]


def test_the_fingerprint_sees_the_scenario_and_the_weights(weights: Path) -> None:
    pipe = SCENARIO.load(weights)
    first = fingerprint(SCENARIO, pipe)
    assert fingerprint(replace(SCENARIO, guidance=2.0), pipe) != first
    with torch.no_grad():
        pipe.transformer.proj_out.bias.add_(1e-3)
    assert fingerprint(SCENARIO, pipe) != first


def test_digests_tell_methods_apart() -> None:
    methods: list[Any] = [
        Uniform(uniform_steps(8, 4)),
        Uniform(uniform_steps(8, 5)),
        Uniform(uniform_steps(8, 4), name="lemica"),
        FewerSteps(4, 8),
        first_block_cache(0.1),
        first_block_cache(0.2),
        np.zeros(3),
        np.zeros(4),
        torch.ones(3),
    ]
    assert len({digest(method) for method in methods}) == len(methods)
    assert digest(first_block_cache(0.1)) == digest(first_block_cache(0.1))


# Measuring


def test_a_stopped_measurement_goes_on_where_it_stopped(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[str] = []
    plain = measuring_module.run_once

    def run(pipe: Any, method: Any, batch: Any) -> Any:
        runs.append(f"{method.name} {method.compute_share:.3f}")
        if len(runs) == stop_after:
            raise KeyboardInterrupt
        return plain(pipe, method, batch)

    monkeypatch.setattr(measuring_module, "run_once", run)
    field = entrants(*range(1, STEPS))  # two blocks a batch
    assert len(field) > BLOCK
    stop_after = 2 + BLOCK + 1 + 1  # within the second block of the first batch
    with pytest.raises(KeyboardInterrupt):
        measuring(inputs).run(field)
    done = [e for e in field if measuring(inputs).path(e, 0, 0).exists()]
    assert len(done) == BLOCK, "the finished block is kept, the other one is not"
    first = {e.label: measuring(inputs).path(e, 0, 0).read_bytes() for e in done}

    runs.clear()
    stop_after = -1
    again = measuring(inputs)
    again.run(field)
    assert runs.count("uniform 0.125") == 1, "measured in the first batch, missing in the second"
    assert len([r for r in runs if r.startswith("uniform")]) == 2 * len(field) - BLOCK
    assert {e.label: again.path(e, 0, 0).read_bytes() for e in done} == first
    curve = again.curves(field)["uniform"]
    assert [len(point.values["psnr"]) for point in curve.points] == [3] * len(field)

    runs.clear()
    measuring(inputs).run(field)
    assert runs == [], "nothing is left to do"


def test_quality_is_that_of_the_images_and_falls_with_the_steps(inputs: Inputs) -> None:
    field = entrants(8, 6, 2)
    found = measuring(inputs)
    found.run(field)
    exact, good, poor = found.curves(field)["uniform"].points
    assert exact.values["psnr"].tolist() == [120.0] * 3
    assert exact.psnr_mean > good.psnr_mean > poor.psnr_mean
    assert poor.speedup > 1.5
    assert found.images(field[0]).shape[1:] == (3, 32, 32)
    assert torch.equal(found.images(field[0]), found.references())


def test_a_foreign_method_that_fails_is_reported_and_the_rest_goes_on(inputs: Inputs) -> None:
    class Broken(FewerSteps):
        def attach(self, pipe: Any) -> Any:
            raise RuntimeError("no such kernel")

    said: list[str] = []
    field = [Entrant("other", "x", Broken(4, STEPS)), *entrants(4)]
    found = measuring(
        inputs,
        foreign=frozenset({"other"}),
        on_failure=lambda family, error: said.append(f"{family}: {error}"),
    )
    found.run(field)
    assert said == ["other: no such kernel"]
    assert list(found.curves(field)) == ["uniform"]
    with pytest.raises(RuntimeError, match="no such kernel"):
        measuring(inputs).run(field)


# What is written


def scenario_result() -> ScenarioResult:
    def curve(name: str, height: float, slope: float) -> Curve:
        return Curve(
            name,
            tuple(
                Point(
                    label=f"{name} <{speed}>",
                    speedup=speed,
                    compute_share=1 / speed,
                    values={
                        "psnr": np.array([height + 5, height - 5]) - slope * speed,
                        "ssim": np.array([0.99, 0.97]),
                    },
                    peak_bytes=100,
                )
                for speed in (1.3, 1.6, 2.0)
            ),
        )

    curves = [
        curve("layercache", 70, 5),
        curve("layercache-published", 60, 5),
        curve("meancache", 61, 10),
        curve("other", 65, 20),
    ]
    return ScenarioResult(
        SCENARIO,
        {c.method: c for c in curves},
        (1.5, 2.0, 3.0),
        {"gone": "it is <not> here"},
        {"Model": "tiny & random"},
        1.0,
    )


def test_margins_name_the_best_rival_at_each_speed() -> None:
    found = scenario_result()
    at = {(m["method"], m["against"]): m for target in (1.5,) for m in margins(found, target)}
    # At 1.5x "other" has 65 - 30 = 35 dB and MeanCache 61 - 15 = 46.
    assert at["layercache", "meancache"]["against_is_best_rival"]
    assert at["layercache", "meancache"]["psnr_mean"] == pytest.approx(70 - 7.5 - 46, abs=0.1)
    assert at["layercache", "layercache-published"]["psnr_mean"] == pytest.approx(10)
    assert ("layercache-published", "meancache") in at
    assert margins(found, 3.0) == [], "no curve reaches 3x"


def test_goals_are_met_or_missed_by_the_figures() -> None:
    found = replace(scenario_result(), targets=(1.37, 1.71, 2.0, 4.0))
    met = {(goal.what, goal.target_speedup): goal for goal in goals(found)}
    assert met["mean PSNR over MeanCache", 2.0].figure == pytest.approx(70 - 10 - 41)
    assert met["mean PSNR over MeanCache", 2.0].met
    assert met["mean PSNR over the published LayerCache", 1.71].figure == pytest.approx(10)
    assert ("mean PSNR over the published LayerCache", 2.0) not in met
    out_of_reach = met["mean PSNR over MeanCache", 4.0]
    assert out_of_reach.figure is None and not out_of_reach.met
    weaker = dict(found.curves)
    weaker["layercache"], weaker["other"] = weaker["other"], weaker["layercache"]
    lost = {(g.what, g.target_speedup): g for g in goals(replace(found, curves=weaker))}
    goal = lost["mean PSNR over the best rival (other)", 2.0]
    assert goal.figure is not None and goal.figure < 0 and not goal.met
    assert "| no |" in markdown([replace(found, curves=weaker)], "python -m bench")


def test_results_are_rows_as_in_the_demo_and_plain_json() -> None:
    data = json.loads(json.dumps(scenario_result().to_dict(), allow_nan=False))
    assert len(data["rows"]) == 2 * 4
    keys = {
        "method", "target_speedup", "compute_share", "speedup_measured", "speedup_predicted",
        "psnr_mean", "psnr_worst", "psnr_median", "ssim_mean",
    }  # fmt: skip
    assert all(keys <= set(row) for row in data["rows"])
    assert data["rows"][0]["speedup_measured"] == 1.5
    assert len(data["settings"]) == 4 * 3
    assert data["skipped"] == {"gone": "it is <not> here"}


def test_tables_show_every_method_and_a_dash_where_a_speed_is_not_reached() -> None:
    text = markdown([scenario_result()], "python -m bench")
    rows = [line for line in text.splitlines() if line.startswith("| other |")]
    assert len(rows) == 1 and rows[0].endswith("| - |")
    assert "**62.5** (62.5, 57.5) 0.9800" in text
    assert "- `gone`: it is <not> here" in text
    assert text.count("layercache over meancache (best rival)") == 2
    lines = [line for line in table(scenario_result()).splitlines() if line.strip()]
    assert len({len(line) for line in lines}) == 1, "columns are aligned"


def test_the_page_is_one_well_formed_file() -> None:
    found = scenario_result()
    page = bench_page([found], {f"curves-{SCENARIO.name}": speed_curves(found.curves, (1.5, 2.0))})
    parsed = Structure()
    parsed.feed(page)
    assert parsed.open == [] and "script" not in parsed.tags and "link" not in parsed.tags
    assert len(parsed.sources) == 1
    assert "tiny &amp; random" in page and "it is &lt;not&gt; here" in page
    assert "other &lt;1.3&gt;" in page


def test_the_bench_does_the_whole_job(weights: Path, tmp_path: Path) -> None:
    said: list[str] = []
    names = ["layercache", "seacache", "fewer-steps"]
    found = run_bench(
        tmp_path / "out",
        [SCENARIO, replace(SECOND, steps=6)],
        TINY,
        methods=names,
        weights=weights,
        results=tmp_path / "benchmarks",
        log=said.append,
        progress=False,
    )
    assert [result.scenario.name for result in found.results] == ["main", "second"]
    for result in found.results:
        assert set(result.curves) <= set(names) and "fewer-steps" in result.curves
    assert {path.name for path in (tmp_path / "benchmarks").iterdir()} == {
        "RESULTS.md",
        "results.json",
    }
    data = json.loads((tmp_path / "benchmarks" / "results.json").read_text())
    assert data == json.loads(json.dumps(found.to_dict()))
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    assert any("minutes on an idle machine" in line for line in said)
    assert any(line.startswith("LPIPS is skipped") for line in said)

    said.clear()
    again = run_bench(
        tmp_path / "out",
        [SCENARIO, replace(SECOND, steps=6)],
        TINY,
        methods=names,
        weights=weights,
        log=said.append,
        progress=False,
    )
    assert again.to_dict() == found.to_dict(), "all of it was kept"
    assert not any(line.startswith("calibrating") for line in said)


def test_a_family_that_cannot_run_is_named_with_its_fault(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(inputs: Inputs) -> list[Entrant]:
        raise ImportError("libfast.so is missing")

    monkeypatch.setitem(FIELD, "other", Family("other", build, "elsewhere", foreign=True))
    found = run_bench(
        tmp_path, [SCENARIO], TINY, methods=["uniform", "other"], weights=weights, progress=False
    )
    assert found.results[0].skipped == {"other": "ImportError: libfast.so is missing"}
    assert "- `other`: ImportError: libfast.so is missing" in (tmp_path / "RESULTS.md").read_text()


def test_an_unknown_method_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LayerCacheError, match="unknown method 'nonsense'; there are layercache, "):
        run_bench(tmp_path, [SCENARIO], TINY, methods=["nonsense"])


# Ablation


def test_a_subset_of_statistics_is_that_of_its_prompts(inputs: Inputs) -> None:
    stats = inputs.stats()
    one = subset(stats, stats.prompt_ids[1:])
    assert one.prompt_ids == stats.prompt_ids[1:]
    np.testing.assert_array_equal(one.velocities, stats.velocities[1:])


def test_the_ablation_changes_one_thing_a_row(weights: Path, tmp_path: Path) -> None:
    found = run_ablation(
        tmp_path,
        SCENARIO,
        TINY,
        weights=weights,
        axes=("prediction", "calibration prompts"),
    )
    rows = {(row.axis, row.value): row for row in found.rows}
    assert ("calibration prompts", "1") in rows and ("units", "groups only") not in rows
    # At a third of the compute, repeating is worse than predicting.
    default, reuse = found.rows[0].psnr_mean[-1], rows["prediction", "reuse"].psnr_mean[-1]
    assert default is not None and reuse is not None and default > reuse
    text = (tmp_path / "ABLATION.md").read_text()
    assert text.count("\n| ") == 1 + len(found.rows)
    assert json.loads((tmp_path / "ablation.json").read_text()) == json.loads(
        json.dumps(found.to_dict())
    )
    assert "prediction: reuse" in found.text()


def test_layercache_runs_as_a_user_compiles_it(inputs: Inputs) -> None:
    for entrant in FIELD["layercache"].build(inputs):
        assert isinstance(entrant.method, LayerCache)
        assert tuple(entrant.method.plan.asked.units) == ("step", "groups")
    compiled = FIELD["layercache"].build(inputs)
    refined = FIELD["layercache-refined"].build(inputs)
    for before, after in zip(compiled, refined, strict=True):
        assert isinstance(before.method, LayerCache) and isinstance(after.method, LayerCache)
        assert before.method.plan.run_steps == after.method.plan.run_steps
    assert any("refined" in e.method.plan.provenance for e in refined)  # type: ignore[attr-defined]
    for entrant in FIELD["layercache-published"].build(inputs):
        assert isinstance(entrant.method, LayerCache)
        plan = entrant.method.plan
        assert tuple(plan.asked.units) == ("groups",) and plan.certificate.solver == "greedy"
        assert plan.asked.predictor == "published"
        assert sum(unit.kind == "group" for unit in plan.units) == 3
