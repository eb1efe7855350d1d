"""Whole pipelines: every change between runs gives what a fresh pipeline gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from layercache.runtime import apply_plan
from tests.runtime.pipelines import PIPELINES, build, planned


def fresh(name: str, **arguments: Any) -> torch.Tensor:
    pipe, call = build(name)
    with apply_plan(pipe, planned(pipe, call)):
        return call(**arguments)


class Stop(Exception):
    """Raised in the middle of a run."""


def stopping(pipe: Any, index: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    if index == 2:
        raise Stop
    return kwargs


@pytest.mark.parametrize("name", PIPELINES)
def test_runs_do_not_influence_one_another(name: str) -> None:
    pipe, call = build(name)
    uncached = call()
    run = apply_plan(pipe, planned(pipe, call))
    first = call()
    assert not torch.equal(first, uncached)
    assert run.report().warnings == ()
    for changes in ({"size": 48}, {"images": 2}, {"guidance": 1.0}, {"size": 48, "images": 3}, {}):
        assert torch.equal(call(**changes), fresh(name, **changes)), changes
        # Nothing of the setting stands in this plan but how many calls a step makes.
        calls = run.report().calls_seen
        assert len(run.report().warnings) == (calls != run.plan.branches), changes
    with pytest.raises(Stop):
        call(callback_on_step_end=stopping)
    # Nothing waits for the next run to be freed.
    assert run.held_bytes == 0
    assert torch.equal(call(), first)
    handle = pipe.transformer.register_forward_pre_hook(_fails_at_second_call())
    with pytest.raises(Stop):
        call()
    handle.remove()
    assert torch.equal(call(), first)
    assert run.report().cache_bytes_seen == run.report().cache_bytes_planned
    run.remove()
    assert torch.equal(call(), uncached)


def _fails_at_second_call() -> Any:
    calls = 0

    def hook(module: Any, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Stop

    return hook
