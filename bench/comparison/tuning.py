"""Settings chosen on validation prompts: every entrant of a tuned family runs, the best go on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bench.comparison.entrants import Entrant
from bench.comparison.equal_speed import Point, pareto_front
from bench.comparison.field import with_share
from bench.comparison.inputs import Inputs
from bench.comparison.work import counted_work
from layercache.calibration.prompts import Batch
from layercache.evaluation._latency import run_once
from layercache.evaluation.methods import Method, Uncached
from layercache.evaluation.metrics import PSNR_CEILING_DB, psnr

_OVERHEAD = (1.25, 1.5)
_EVERYTHING = 0.995


@dataclass(frozen=True)
class Trial:
    """One entrant on the validation prompts: counted share of compute, PSNR of each image."""

    entrant: Entrant
    share: float
    psnr_db: tuple[float, ...]

    @property
    def psnr_mean(self) -> float:
        """Mean PSNR in dB."""
        return sum(self.psnr_db) / len(self.psnr_db)


class Validation:
    """Runs entrants on the validation prompts; nothing is timed, everything is kept on disk."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        size = inputs.size
        self.batches = inputs.scenario.work("validation", size.validation, size.batch)
        self._references: list[tuple[Tensor, int]] | None = None

    def trial(self, entrant: Entrant) -> Trial:
        """One entrant's trial."""

        def run() -> dict[str, object]:
            values: list[float] = []
            share = 0.0
            for batch, (reference, work) in zip(self.batches, self.references, strict=True):
                images, done = self._counted(entrant.method, batch)
                values += psnr(images, reference).tolist()
                share += done / work / len(self.batches)
            return {"share": share, "psnr_db": values, "label": entrant.label}

        title = f"validation {entrant.family} {entrant.label}"
        ids = [batch.ids for batch in self.batches]
        found = self.inputs.store.kept(title, [entrant.method, ids], run)
        return Trial(entrant, found["share"], tuple(found["psnr_db"]))

    @property
    def references(self) -> list[tuple[Tensor, int]]:
        """Uncached images and multiply-adds of each batch."""
        if self._references is None:
            self._references = [self._counted(Uncached(), batch) for batch in self.batches]
        return self._references

    def _counted(self, method: Method, batch: Batch) -> tuple[Tensor, int]:
        with counted_work(self.inputs.pipe.transformer) as work:
            images = run_once(self.inputs.pipe, method, batch).images
        return images, work.multiply_adds


def chosen(trials: Sequence[Trial], shares: Sequence[float], foreign: bool) -> list[Entrant]:
    """The Pareto front over counted share of compute and validation PSNR, thinned to `shares`.

    For every share of compute that methods with a budget are swept over, the entrant of the front
    whose own share is nearest goes on. Foreign methods get two lower shares more, since their
    overhead makes them slower than their share says. A setting that computed everything is no
    acceleration, and none to interpolate from.
    """
    front = pareto_front(
        [
            Point(str(index), 1 / trial.share, trial.share, {"psnr": _values(trial)})
            for index, trial in enumerate(trials)
            if trial.share < _EVERYTHING and max(trial.psnr_db) < PSNR_CEILING_DB
        ]
    )
    wanted = [*shares, *(min(shares) / f for f in _OVERHEAD if foreign)]
    kept: dict[str, Entrant] = {}
    for share in wanted:
        if not front:
            break
        nearest = min(front, key=lambda point: abs(math.log(point.compute_share / share)))
        trial = trials[int(nearest.label)]
        kept[nearest.label] = with_share(trial.entrant, trial.share) if foreign else trial.entrant
    return [kept[label] for label in sorted(kept, key=int)]


def tune(validation: Validation, entrants: Sequence[Entrant], foreign: bool) -> list[Entrant]:
    """Run all entrants of a family on the validation prompts and keep those that `chosen` says.

    A setting at which a foreign method fails is left out; if it fails at all of them, the last
    error is raised.
    """
    trials = []
    failure: Exception | None = None
    for entrant in entrants:
        try:
            trials.append(validation.trial(entrant))
        except Exception as error:
            if not foreign:
                raise
            failure = error
            validation.inputs.log(f"{entrant.family} fails at {entrant.label}: {error}")
    if failure is not None and not trials:
        raise failure
    inputs = validation.inputs
    shares = [count / inputs.scenario.steps for count in inputs.fresh_steps]
    return chosen(trials, shares, foreign)


def _values(trial: Trial) -> NDArray[np.float64]:
    return np.array(trial.psnr_db)
