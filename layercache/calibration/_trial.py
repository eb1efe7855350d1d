"""Two short generations, in which a few steps are computed: what a run can do, takes and needs.

In the first, three steps are computed and timed, and the rest answered with known outputs; run
again on its own record, it shows whether the pipeline can be calibrated at all, before any replay
is paid for. In the second, one step is computed while memory is watched, and the pipeline's own
peak (text encoding, decoding) is seen on the way.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from layercache.calibration._kept import Kept
from layercache.calibration._memory import PeakMemory
from layercache.calibration._record import Performers, Recorder, Run
from layercache.calibration._reenact import check_forgets, check_repeats, check_stateless
from layercache.calibration._replay import RecordedCall, ReplayableTransformer
from layercache.calibration._stage import At, Stage
from layercache.calibration.prompts import Batch
from layercache.errors import StatsError
from layercache.models.gates import Call

TIMED_STEPS = 3


@dataclass(frozen=True)
class Trial:
    """What the short generations showed.

    Attributes:
        run: Of the first, whose kept outputs are gone.
        seconds: By component, (n, G+2) seconds of its computed steps (`StepTimes.seconds`).
        pair_ratio: Time of a doubled batch in units of two single ones; 1 if lags cannot batch.
        pairs: Whether they can.
        fixed_seconds: What a generation takes outside its loop.
        plain_peak: Bytes above the model that the pipeline itself needs.
        live: Bytes that it holds when it calls the transformer.
        forward_bytes: Bytes that one recorded call needs.
        pair_bytes: Bytes that a doubled call needs.
        held_bytes: Bytes that are held of one recorded step.
        kept_bytes: Bytes of the outputs of a whole run.
        primed: See `Run.primed`.
    """

    run: Run
    seconds: dict[str, NDArray[np.float64]]
    pair_ratio: float
    pairs: bool
    fixed_seconds: float
    plain_peak: int
    live: int
    forward_bytes: int
    pair_bytes: int
    held_bytes: int
    kept_bytes: int
    primed: bool


class _Timed(Recorder):
    """A doubled batch is timed at the last step that is computed."""

    pairs = False
    pair_seconds = 0.0
    call_seconds = 0.0
    _seen = 0

    def recorded(self, call: RecordedCall, performer: ReplayableTransformer) -> None:
        """Time a batch twice as large as the recorded one."""
        self._seen += call.number == 0
        last = min(self.computed or 1, len(self.run.sigmas) - 1)
        if self._seen < last or call.number or self.pair_seconds or performer.lags < 2:
            return
        clock = performer.times.clock
        start = clock.mark()
        self.pairs = performer.batches_repeat(call)
        self.pair_seconds = clock.seconds(start, clock.mark())


class _Watched(Recorder):
    """Memory is watched around what is recorded."""

    memory: PeakMemory
    pairs = False
    plain_peak = live = forward_bytes = pair_bytes = held_bytes = 0
    _before = 0

    def lap(self) -> int:
        """Peak since the last lap, which the pipeline itself has caused."""
        found = self.memory.lap()
        self.plain_peak = max(self.plain_peak, found)
        return found

    def _performed(self, at: At, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.lap()
        self._before = self.memory.live
        self.live = max(self.live, self._before)
        return super()._performed(at, inner, args, kwargs)

    def recorded(self, call: RecordedCall, performer: ReplayableTransformer) -> None:
        """Note what the call needed, and what a doubled one would."""
        self.forward_bytes = max(self.forward_bytes, self.lap() - self._before)
        self.held_bytes = max(self.held_bytes, performer.held_bytes(call))
        if performer.lags > 1 and call.number == 0 and not self.pair_bytes:
            before = self.memory.live
            self.pairs = performer.batches_repeat(call)
            # Calibration's own, so that it is no part of the plain peak.
            self.pair_bytes = self.memory.lap() - before


def try_out(stage: Stage, batch: Batch, performers: Performers) -> Trial:
    """Run the short generations.

    Raises:
        StatsError: The pipeline or its scheduler cannot be calibrated; the message says why.
    """
    timed, seconds = _timed(stage, batch, performers)
    run = timed.run
    try:
        others = check_repeats(stage, batch, run)
        check_forgets(stage, batch, run, others)
        primed = check_stateless(stage, batch, run, others)
        kept_bytes = run.kept.held
    finally:
        run.kept.close()
    watched = _watched(stage, batch, performers)
    rows = {name: performer.times.seconds() for name, performer in performers.items()}
    first = next(iter(performers))
    forward = float(np.median(rows[first][min(1, len(rows[first]) - 1) :, :-1].sum(axis=1)))
    calls = max(len(step.shapes) for step in run.calls if step.component == first)
    spent = sum(float(table.sum()) for table in rows.values())
    return Trial(
        run=run,
        seconds=rows,
        pair_ratio=timed.pair_seconds / max(2 * forward / calls, 1e-12) if timed.pairs else 1.0,
        pairs=timed.pairs and watched.pairs,
        fixed_seconds=max(0.0, seconds - spent - timed.pair_seconds),
        plain_peak=watched.plain_peak,
        live=watched.live,
        forward_bytes=watched.forward_bytes,
        pair_bytes=watched.pair_bytes,
        held_bytes=watched.held_bytes,
        kept_bytes=kept_bytes,
        primed=primed,
    )


def _timed(stage: Stage, batch: Batch, performers: Performers) -> tuple[_Timed, float]:
    run = Run(Kept(float("inf")))
    director = _Timed(stage, performers, run, len(batch.ids), computed=TIMED_STEPS)
    began = time.perf_counter()
    try:
        stage.play(batch, director, "note")
        run.require_whole()
        idle = [name for name in performers if name not in {s.component for s in run.calls}]
        if idle:
            raise StatsError(
                f"{idle[0]} is called at no step of this run: name another component=, or other "
                "noise levels"
            )
    except BaseException:
        run.kept.close()
        raise
    return director, time.perf_counter() - began


def _watched(stage: Stage, batch: Batch, performers: Performers) -> _Watched:
    times = {name: performer.times for name, performer in performers.items()}
    for performer in performers.values():
        performer.clear()
        performer.times = performer.times.like()
    run = Run(Kept(float("inf")))
    director = _Watched(stage, performers, run, len(batch.ids), computed=1)
    director.memory = PeakMemory(next(iter(performers.values())).device)
    try:
        # Operations within compiled blocks would not be seen, and fullgraph=True would fail.
        with torch.compiler.set_stance("force_eager"), director.memory:
            stage.play(batch, director, "note")
            director.lap()
    finally:
        run.kept.close()
        for name, performer in performers.items():
            performer.times = times[name]
    return director
