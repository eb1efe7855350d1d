"""Arguments that name a file of LayerCache: one of another kind is told by what it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from layercache._json import parse
from layercache.plan import Plan
from layercache.plan_set import PlanSet

PLAN = "a plan (of `layercache compile`)"
SET = "a set of plans (of `layercache bundle`)"
STATISTICS = "statistics (of `layercache calibrate`)"


class FileOf(click.Path):
    """A path, refused where it holds a file of another kind; what is none at all the loader tells.

    Args:
        kinds: Of `PLAN`, `SET` and `STATISTICS`.
    """

    def __init__(self, *kinds: str) -> None:
        super().__init__(path_type=Path, dir_okay=False)
        self.kinds = kinds

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        try:
            require_kind(path, *self.kinds)
        except click.UsageError as error:
            self.fail(error.message, param, ctx)
        return path


def kind_of(path: Path) -> str | None:
    """Which of the kinds a file is; None where it is none of them or cannot be read."""
    try:
        # What is no regular file, such as /dev/stdin, can be read but once.
        if not path.is_file():
            return None
        with path.open("rb") as stream:
            start = stream.read(2)
            if start == b"PK":
                return STATISTICS
            found = parse((start + stream.read()).decode())
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict):
        return None
    return SET if "plans" in found else PLAN if "units" in found else None


def require_kind(path: Path, *kinds: str) -> None:
    """Refuse a file of another kind.

    Raises:
        click.UsageError: Says what it is.
    """
    found = kind_of(path)
    if found is not None and found not in kinds:
        wanted = " or ".join(kinds) or "a text file with one prompt a line"
        raise click.UsageError(f"{path} is {found}; give {wanted}")


def load_shared(path: Path) -> Plan | PlanSet:
    """A file that holds a plan or a set of them."""
    return PlanSet.load(path) if kind_of(path) == SET else Plan.load(path)


PLAN_FILE, STATS_FILE, SHARED_FILE = FileOf(PLAN), FileOf(STATISTICS), FileOf(PLAN, SET)
ANY_FILE, PROMPT_FILE = FileOf(PLAN, SET, STATISTICS), FileOf()
