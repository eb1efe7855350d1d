"""Every entry of the zoo: calibrated, compiled, applied, evaluated. Oracle: watched plain runs.

Sketches of vectors that are no longer than the sketch are the vectors themselves, so what
calibration recorded has to equal what a plain run made, bit for bit.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from layercache import Budget, compile_plan
from layercache.calibration import calibrate
from layercache.errors import LayerCacheError
from layercache.evaluation.metrics import PSNR_CEILING_DB, fidelity
from layercache.models.pipelines import decodes
from layercache.plan import Plan, UnitPlan
from layercache.runtime import apply_plan
from layercache.stats import CalibrationStats
from tests.pipelines.entry import Entry
from tests.pipelines.observe import SEED, Observed, observe, run
from tests.pipelines.registry import ENTRIES, SLACK_DB

WORKING = [entry for entry in ENTRIES if not entry.refused]
REFUSED = [entry for entry in ENTRIES if entry.refused]
SPEEDUP = 1.3


def measured(entry: Entry, pipe: Any, **options: Any) -> CalibrationStats:
    """Statistics of the entry's prompt, in two groups and at two lags, whole and unsketched."""
    more: dict[str, Any] = (
        {} if entry.component in ("transformer", "unet") else {"component": entry.component}
    )
    more["groups"] = 2 if entry.grouped else None
    return calibrate(
        pipe, [entry.prompt(1)], num_inference_steps=entry.steps, lags=2, seed=SEED,
        sketch_size=1 << 20, probes=1, call_kwargs=entry.call(), progress=False,
        **{**more, **options},
    )  # fmt: skip


def evenly_timed(stats: CalibrationStats) -> CalibrationStats:
    """The statistics with made-up times: those of tiny models are noise, and budgets need some."""
    times = [10.0] * stats.num_groups + [1.0 if stats.num_groups else 10.0, 1.0]
    return dataclasses.replace(stats, times_ms=np.tile(times, (stats.num_prompts, 1)))


def assert_recorded_is_plain(stats: CalibrationStats, plain: Observed, entry: Entry) -> None:
    """Bit for bit; where the pipeline itself makes a part of the latent, in the other part."""
    sign = np.float32(-1.0 if entry.negated else 1.0)
    live = flat(plain.live) if entry.partial else np.float32(1.0)
    assert 0 < np.mean(live) < 1 or not entry.partial
    assert stats.passes == entry.passes
    assert len(plain.velocities) == stats.passes * (stats.num_steps - 1) + 1
    for step, velocity in enumerate(plain.velocities[:: entry.passes]):
        np.testing.assert_array_equal(stats.velocities[0, step], sign * live * flat(velocity))
    for step, latent in enumerate([*plain.latents[:: entry.passes], plain.made[-1]]):
        np.testing.assert_array_equal(stats.latents[0, step], live * flat(latent))


def flat(tensor: Tensor) -> Any:
    return tensor.float().flatten().numpy()


def all_computed(plan: Plan) -> Plan:
    """The plan's units with every cell computed."""
    cells = "#" * plan.num_steps
    units = tuple(
        UnitPlan(kind=u.kind, block_list=u.block_list, start=u.start, stop=u.stop, cells=cells)
        for u in plan.units
    )
    return plan.model_copy(update={"units": units, "schema_version": 1})


def assert_run_follows(entry: Entry, pipe: Any, plan: Plan) -> Tensor:
    options = {} if entry.component == "transformer" else {"component": entry.component}
    with apply_plan(pipe, plan, **options) as applied:
        output = run(entry, pipe)
    report = applied.report()
    assert report.warnings == ()
    for unit in report.units:
        assert unit.as_planned, unit.name
    return output


@pytest.mark.parametrize("entry", WORKING, ids=lambda entry: entry.name)
def test_calibrate_compile_apply(entry: Entry) -> None:
    with entry.patches():
        pipe = entry.build()
        plain = observe(entry, pipe)
        assert plain.output is not None
        stats = evenly_timed(measured(entry, pipe))
        assert_recorded_is_plain(stats, plain, entry)
        # Calibration leaves nothing behind.
        assert torch.equal(run(entry, pipe), plain.output)
        plan = compile_plan(stats, Budget(speedup=SPEEDUP))
        everything = assert_run_follows(entry, pipe, all_computed(plan))
        # Of a step with two calls a plan makes the first alone.
        assert torch.equal(everything, plain.output) == (entry.passes == 1)
        for units in ("step", "groups") if entry.grouped else ("step",):
            plan = compile_plan(stats, Budget(speedup=SPEEDUP), units=(units,))
            assert plan.predicted.speedup >= SPEEDUP
            assert plan.predicted.psnr_db is not None and np.isfinite(plan.predicted.psnr_db)
            output = assert_run_follows(entry, pipe, plan)
            quality = fidelity(output, plain.output, decoded=decodes(pipe))
            # A plan may turn out better than it promises, not much worse.
            assert plan.predicted.psnr_db - SLACK_DB < quality.psnr_mean < PSNR_CEILING_DB
        assert torch.equal(run(entry, pipe), plain.output)


@pytest.mark.parametrize("entry", REFUSED, ids=lambda entry: entry.name)
def test_what_cannot_be_measured_is_refused(entry: Entry) -> None:
    with entry.patches():
        pipe = entry.build()
        plain = run(entry, pipe)
        with pytest.raises(LayerCacheError):
            measured(entry, pipe)
        assert torch.equal(run(entry, pipe), plain)
