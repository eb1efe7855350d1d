"""The zoo is complete, and the page says what is in it."""

from __future__ import annotations

import inspect

import diffusers

from tests.models.zoo import BUILDERS
from tests.pipelines.registry import ENTRIES, MISSING
from tests.pipelines.table import PAGE, declared_scheduler, facts_of, table

_SCM = "declares DPM-Solver++, and its loop and its checkpoints are made for SCMScheduler"
OTHERS = {"SanaSprintPipeline": _SCM, "SanaSprintImg2ImgPipeline": _SCM}
"""Pipelines that run on another scheduler than they declare, and why."""


def test_the_page_has_the_table_of_these_entries() -> None:
    assert table() in PAGE.read_text(), "run python -m tests.pipelines.table"


def test_every_family_has_an_entry() -> None:
    assert {facts_of(entry)[0] for entry in ENTRIES} >= set(BUILDERS)


def test_every_pipeline_of_diffusers_is_in_the_zoo_or_named_as_missing() -> None:
    supported = set()
    for name in dir(diffusers):
        if not name.endswith("Pipeline"):
            continue
        parameter = inspect.signature(getattr(diffusers, name).__init__).parameters.get(
            "transformer"
        )
        if parameter is not None and any(b in str(parameter.annotation) for b in BUILDERS):
            supported.add(name)
    there = {
        entry.pipeline
        for entry in ENTRIES
        if hasattr(diffusers, entry.pipeline) and facts_of(entry)[0] in BUILDERS
    }
    assert supported == there | set(MISSING)
    assert not there & set(MISSING)


def test_every_pipeline_runs_on_the_scheduler_that_it_declares() -> None:
    used: dict[str, set[str]] = {}
    for entry in ENTRIES:
        if hasattr(diffusers, entry.pipeline):
            used.setdefault(entry.pipeline, set()).add(facts_of(entry)[2])
    other = {
        name
        for name, schedulers in used.items()
        if declared_scheduler(name) and declared_scheduler(name) not in schedulers
    }
    assert other == set(OTHERS)
