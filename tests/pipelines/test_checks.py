"""The check "recorded = plain" can fail, and what a loop makes of its own index is recorded.

Oracle of the first part: a run in which every timestep is handed to the loop twice, as calibration
once did. A pipeline, a guidance or a scheduler that looks at the loop's index or at the number of
timesteps then makes something else of it, and the check of the zoo has to say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import (
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    StableDiffusion3Pipeline,
)
from torch import Tensor

from layercache.errors import LayerCacheError
from tests.pipelines.entry import Entry
from tests.pipelines.observe import observe, run, watched
from tests.pipelines.registry import BY_NAME
from tests.pipelines.test_matrix import assert_recorded_is_plain, measured

SD3 = BY_NAME["StableDiffusion3Pipeline: text-to-image"]
HUNYUAN = BY_NAME["HunyuanVideo15Pipeline: text-to-video"]


class CountingBar:
    """A progress bar that knows how often it was updated, which is the loop's index."""

    n = 0

    def __enter__(self) -> CountingBar:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def update(self, by: int = 1) -> None:
        self.n += by


class IndexedPipeline(StableDiffusion3Pipeline):
    """Guidance grows with the loop's index."""

    bar: CountingBar | None = None

    def progress_bar(self, *_: Any, **__: Any) -> CountingBar:
        self.bar = CountingBar()
        return self.bar

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale * (1.0 + 0.1 * (0 if self.bar is None else self.bar.n))


class CallCountingPipeline(StableDiffusion3Pipeline):
    """Guidance grows with every call of the pipeline: two runs are never equal."""

    calls = 0

    def progress_bar(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().progress_bar(*args, **kwargs)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale * (1.0 + 0.1 * self.calls)


class IndexedGuidance(ClassifierFreeGuidance):
    """Guidance falls with the index that the loop tells it."""

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> Any:
        output = super().forward(pred_cond, pred_uncond)
        output.pred = output.pred * (1.0 - 0.05 * self._step)
        return output


class IndexedScheduler(FlowMatchEulerDiscreteScheduler):
    """Extrapolates by half a step, except at what it takes for the last step, as UniPC does."""

    before: Tensor | None = None

    def step(self, model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        index = self.step_index or 0
        used = model_output
        if self.before is not None and 0 < index < len(self.timesteps) - 1:
            used = model_output + 0.5 * (model_output - self.before)
        self.before = model_output
        return super().step(used, *args, **kwargs)


def indexed_pipeline() -> tuple[Entry, Any]:
    pipe = SD3.build()
    return SD3, _like(IndexedPipeline, pipe)


def indexed_guidance() -> tuple[Entry, Any]:
    pipe = HUNYUAN.build()
    pipe.guider = IndexedGuidance(guidance_scale=3.0)
    return HUNYUAN, pipe


def indexed_scheduler() -> tuple[Entry, Any]:
    pipe = SD3.build()
    pipe.scheduler = IndexedScheduler(shift=3.0)
    return SD3, pipe


def _like(cls: type, pipe: Any) -> Any:
    made = cls(**pipe.components)
    made.set_progress_bar_config(disable=True)
    return made


INDEXED = (indexed_pipeline, indexed_guidance, indexed_scheduler)


@contextmanager
def handed_out_twice(scheduler: Any) -> Iterator[None]:
    """Every timestep comes twice; the first time the scheduler does not move."""
    set_timesteps, step = type(scheduler).set_timesteps, type(scheduler).step
    seconds = [False]

    def twice(self: Any, *args: Any, **kwargs: Any) -> None:
        set_timesteps(self, *args, **kwargs)
        self.timesteps = self.timesteps.repeat_interleave(2)
        self.set_begin_index(0)

    def every_other(
        self: Any, output: Tensor, t: Any, sample: Tensor, *args: Any, **kw: Any
    ) -> Any:
        seconds[0] = not seconds[0]
        return (sample,) if seconds[0] else step(self, output, t, sample, *args, **kw)

    # A pipeline looks at the signature for what it may pass.
    twice.__signature__ = __import__("inspect").signature(set_timesteps)  # type: ignore[attr-defined]
    with (
        mock.patch.object(type(scheduler), "set_timesteps", twice),
        mock.patch.object(type(scheduler), "step", every_other),
    ):
        yield


class Recorded:
    """What the check reads of statistics, of an observed run."""

    passes = 1

    def __init__(self, seen: Any) -> None:
        self.num_steps = len(seen.velocities)
        self.velocities = torch.stack([v.float().flatten() for v in seen.velocities])[None]
        latents = [z.float().flatten() for z in (*seen.latents, seen.made[-1])]
        self.latents = torch.stack(latents)[None]


def in_the_old_way(entry: Entry, pipe: Any) -> Any:
    with watched(entry, pipe) as seen, handed_out_twice(pipe.scheduler):
        run(entry, pipe)
    return Recorded(seen)


@pytest.mark.parametrize("entry", [SD3, HUNYUAN], ids=lambda entry: entry.pipeline)
def test_the_check_passes_where_nothing_looks_at_the_index(entry: Entry) -> None:
    pipe = entry.build()
    assert_recorded_is_plain(in_the_old_way(entry, pipe), observe(entry, pipe), entry)


@pytest.mark.parametrize("make", INDEXED, ids=lambda make: make.__name__)
def test_the_check_can_fail(make: Callable[[], tuple[Entry, Any]]) -> None:
    entry, pipe = make()
    plain, recorded = observe(entry, pipe), in_the_old_way(entry, pipe)
    with pytest.raises(AssertionError):
        assert_recorded_is_plain(recorded, plain, entry)


@pytest.mark.parametrize("make", INDEXED, ids=lambda make: make.__name__)
def test_what_the_loop_makes_of_its_index_is_recorded(
    make: Callable[[], tuple[Entry, Any]],
) -> None:
    entry, pipe = make()
    plain = observe(entry, pipe)
    assert_recorded_is_plain(measured(entry, pipe), plain, entry)


def test_a_callback_that_looks_at_the_index_is_recorded() -> None:
    def fade(pipe: Any, index: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": values["latents"] * (1.0 - 0.01 * index)}

    entry = _with(SD3, callback_on_step_end=fade)
    pipe = entry.build()
    assert_recorded_is_plain(measured(entry, pipe), observe(entry, pipe), entry)


def _with(entry: Entry, **more: Any) -> Entry:
    fields = vars(entry) | {"call": lambda: entry.call() | more}
    return Entry(**fields)


def test_a_pipeline_that_never_repeats_itself_is_refused() -> None:
    pipe = _like(CallCountingPipeline, SD3.build())
    with pytest.raises(LayerCacheError):
        measured(SD3, pipe)


@pytest.mark.parametrize(
    "scheduler",
    [FlowMatchLCMScheduler(shift=3.0), FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)],
    ids=["LCM", "stochastic Euler"],
)
def test_noise_of_the_scheduler_is_the_same_in_every_run_or_it_is_refused(scheduler: Any) -> None:
    pipe = SD3.build()
    pipe.scheduler = scheduler
    plain = observe(SD3, pipe)
    try:
        stats = measured(SD3, pipe)
    except LayerCacheError as error:
        assert type(scheduler).__name__ in str(error)
        return
    assert_recorded_is_plain(stats, plain, SD3)
