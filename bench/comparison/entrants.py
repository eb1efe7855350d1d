"""`Family` and `Entrant`: a method of the comparison, and one of its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.comparison.inputs import Inputs
from layercache.evaluation.methods import Method


@dataclass(frozen=True)
class Entrant:
    """A method at one setting, which `label` says in words."""

    family: str
    label: str
    method: Method


@dataclass(frozen=True)
class Family:
    """A row of the comparison.

    Attributes:
        name: As it stands in the table.
        build: Its entrants, given what is known from calibration prompts.
        source: Where the method comes from, for the report.
        tuned: Whether its settings are chosen on validation prompts.
        foreign: Whether other people's code runs, whose failure is reported and not ours to fix.
    """

    name: str
    build: Callable[[Inputs], list[Entrant]]
    source: str
    tuned: bool = False
    foreign: bool = False
