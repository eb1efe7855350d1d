"""The table of pipelines in docs/runtime.md. `python -m tests.pipelines.table` writes it anew."""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from pathlib import Path
from typing import Any

import diffusers

from layercache.models.adapters import adapter_for
from tests.pipelines.entry import Entry
from tests.pipelines.registry import ENTRIES, MISSING, SLACK_DB

PAGE = Path(__file__).parents[2] / "docs" / "runtime.md"
BEGIN, END = "<!-- pipelines:begin -->", "<!-- pipelines:end -->"
COVERED = "all of it"
WHOLE = "all but groups"


@functools.cache
def facts_of(entry: Entry) -> tuple[str, str, str]:
    """Classes of the transformer, the pipeline and the scheduler of an entry, as they are built."""
    pipe = entry.build()
    family = adapter_for(getattr(pipe, entry.component), required=False).class_name
    return family, entry.pipeline, type(pipe.scheduler).__name__


def declared_scheduler(pipeline: str) -> str:
    """The scheduler class that a pipeline declares; empty where it declares a union."""
    cls: Any = getattr(diffusers, pipeline)
    annotation = inspect.signature(cls.__init__).parameters["scheduler"].annotation
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    return name if hasattr(diffusers, name) else ""


def rows() -> list[tuple[str, str, str, str, str]]:
    """Transformer, pipeline, scheduler, variants, and what was covered or why it is refused."""
    found: dict[tuple[str, str, str, str], list[str]] = defaultdict(list)
    for entry in ENTRIES:
        covered = COVERED if entry.grouped else WHOLE
        outcome = f"refused: {entry.refused}" if entry.refused else covered
        found[*facts_of(entry), outcome].append(entry.variant)
    return [(*facts, "; ".join(variants), last) for (*facts, last), variants in found.items()]


def table() -> str:
    """The table as Markdown, with the pipelines that are left out."""
    lines = [
        BEGIN,
        "",
        f"{len(ENTRIES)} variants of {len({entry.pipeline for entry in ENTRIES})} pipelines. Each "
        "is run plainly, calibrated (what is recorded equals the plain run bit for bit), compiled "
        "for 1.3x with whole steps and with groups alone, run under both plans (the PSNR to the "
        f"plain run is what they promise, or at most {SLACK_DB:g} dB lower) and under one that "
        "computes everything (bit-identical). There are no groups where the model has no adapter "
        "or the scheduler calls it twice a step (Heun), under which a plan that computes all steps "
        "makes one call a step and is not bit-identical.",
        "",
        "| transformer | pipeline | scheduler | variants | |",
        "|---|---|---|---|---|",
    ]
    before = ""
    for family, pipeline, scheduler, variants, outcome in rows():
        lines.append(
            f"| {'' if family == before else family} | {pipeline} | {scheduler} | {variants} "
            f"| {outcome} |"
        )
        before = family
    lines += ["", "Not tried, of the pipelines with these transformers:", ""]
    lines += [f"- {name}: {reason}" for name, reason in MISSING.items()]
    return "\n".join([*lines, "", END])


def main() -> None:
    """Write the table into the page."""
    text = PAGE.read_text()
    start, stop = text.index(BEGIN), text.index(END) + len(END)
    PAGE.write_text(text[:start] + table() + text[stop:])


if __name__ == "__main__":
    main()
