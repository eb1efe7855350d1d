"""The error model: how far the accelerated run ends from the uncached one, foretold.

Between a computed step a and the next one e (or the end) the latent makes one move, by the mean
velocity m_a = u_a + sum_h b_h (u_a - u_{a_h}). With S_a the error of the latent at a, z the
latents of the uncached run, and A the growth of an error until the end (`stats.propagation`),

    S_e = g S_a + (sigma_e - sigma_a) m_a - (z_e - z_a),      g = A_a / A_e.

u_t = v_t + sum_g x_g is what step t computes: the uncached run's velocity, moved by the groups that
are cached there (`_cells`), each with what it leaves unanswered of the others (`_responses`). The
taps of each row b_a are fitted (`ridge`) to make the error at the
end of its own stretch small, given what the rows before have left: errors are paid back soon, and
no row leans on a later one. Before the first skipped step (under Euler's method, the first cached
group) the sampler moves the latent as it would: S_e = g S_a + (sigma_e - sigma_a) sum_g x_g. One
that calls the model twice a step (Heun's) never does: a plan makes computed steps of their first
call.

Beside S goes a variance D of what is known by its size only, for each prompt:

    D_e = g^2 D_a + (sigma_e - sigma_a)^2 [ (1 + sum_h b_h)^2 I_a + sum_h b_h^2 I_{a_h} ]
        + sum_h ((sigma_e - sigma_a) b_h rate)^2 (||S_a - S_{a_h}||^2 + D_a + D_{a_h})

- The last line: the accelerated run's velocities are those of latents that are off. The part of it
  that lets errors grow is in A; a tap multiplies besides how differently off two of them are. The
  rate, of the velocity by the latent, is the mean rate of the growth, at least 1. Without it a
  search finds schedules with large taps, on which the run does not do as foretold.
- I_t is what is known by its size only of what groups cached at one step do to one another. Of
  statistics without responses all of it is: it is taken to be as large as it can be if each group's
  change keeps its size and all point one way, (sum_g ||delta_g||)^2 - sum_g ||delta_g||^2, and x_g
  is delta_g.

So far an error grows *along* its own direction, which is what a row has to pay back on arrival.
Over many rows growth turns it into directions that only the model knows. The other extreme, with
the same taps, is that all that grows is *turned* away: S_e = S_a + ..., and (g^2 - 1) ||S_a||^2
more in D_e. The truth lies between, and the error that is foretold is the geometric mean of both,
||S||^2 + D at the end. The *score* that schedules are compared by is the mean over prompts of its
log10. (Mean PSNR on 32 validation prompts at 0.73, 0.50, 0.33 and 0.25 of the compute: with
guidance and 50 steps, seen 67 / 59 / 51 / 43 dB, foretold 71 / 64 / 58 / 51 along and 67 / 59 / 50
/ 44 turned; without, at 28 steps, seen 69 / 57 / 49 / 41, foretold 70 / 60 / 51 / 44 and 65 / 53 /
40 / 38. Over 12 good schedules of one budget the correlation of mean PSNR with either and with the
score was 0.54, 0.76 and 0.67, and of ranks, over 15 schedules, 0.81, 0.87 and 0.90.)

Statistics of mode `"residual"` know no directions between groups: x_g is 0 then, and all of
(sum_g ||delta_g||)^2 is in I_t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from layercache.prediction._cells import Cell, GroupCells
from layercache.prediction._responses import Responses
from layercache.prediction._states import Cells, Passed, State, Stretch
from layercache.prediction._vectors import fold, short
from layercache.prediction.ridge import DECIMALS, LeastSquares, quick_fit
from layercache.solver.problem import BoolArray
from layercache.stats import CalibrationStats, FloatArray

DEPTH = 4
"""Earlier computed values that a prediction may read. Of step rows, two lost 0.4 dB and six gained
0.05 (mean of four budgets, 32 validation prompts)."""
LEAST_RATE = 1.0
"""How fast a velocity changes with its latent, whatever the growth: for Gaussian data it is 1 at
both ends of a straight path."""
SKETCH = 64
"""Numbers that a vector is folded to while schedules with cached groups are searched."""
_TRAILS = 3


@dataclass(frozen=True, eq=False)
class Fit:
    """A schedule with its taps.

    Attributes:
        computed: (T, 1+G) computed cells, of the step unit and of each group.
        taps: A row a step, of the step unit.
        cells: For each group its cached cells, by step.
        error: (P,) mean squared error per element of the final latent, as foretold.
    """

    computed: BoolArray
    taps: tuple[tuple[float, ...], ...]
    cells: tuple[dict[int, Cell], ...]
    error: FloatArray

    @property
    def score(self) -> float:
        """What schedules are compared by: mean log10 of the error; minus infinity without any."""
        return mean_log10(self.error)


class ErrorModel:
    """Fits and scores schedules of one set of statistics.

    A schedule is a table (T, 1+G): whether each step, and each group, is computed.

    Args:
        stats: Calibration statistics.
        predictor: `"fitted"`, `"published"` or `"reuse"`.
        depth: Most earlier computed values that a prediction reads.
        quick: For a search: vectors are made short, and taps have one ridge.
        groups: Whether groups may be cached; a search without needs less.

    Example:
        >>> model = ErrorModel(stats)  # doctest: +SKIP
        >>> model.fit(computed).taps[20]  # doctest: +SKIP
        (0.731, -0.204, 0.05, -0.011)
    """

    def __init__(
        self,
        stats: CalibrationStats,
        predictor: str = "fitted",
        depth: int = DEPTH,
        *,
        quick: bool = False,
        groups: bool = True,
    ) -> None:
        self.predictor, self.depth, self.quick = predictor, depth, quick
        self.steps, self.numel = stats.num_steps, stats.numel
        self.sigmas = np.asarray(stats.sigmas, dtype=np.float64)
        self.growth = np.append(stats.propagation, stats.propagation[-1])
        grown = np.log(self.growth[0] / self.growth[-1])
        self.rate = max(LEAST_RATE, float(grown / (self.sigmas[0] - self.sigmas[-1])))
        # The first steps of segments: nothing is read across them.
        self.begins = np.diff(stats.segments, prepend=-1) > 0
        self.euler, self.twice = moves_as_euler(stats), stats.passes > 1
        self.joint = stats.mode == "replay"
        velocities: FloatArray = np.asarray(stats.velocities, dtype=np.float64)
        moves: FloatArray
        if self.euler:
            moves = np.diff(self.sigmas)[:, None] * velocities
        else:
            moves = np.diff(np.asarray(stats.latents, dtype=np.float64), axis=1)
        deltas = np.asarray(stats.deltas) if groups else None
        if quick and deltas is None:
            vectors = short(np.concatenate([velocities, moves], axis=1))
            velocities, moves = vectors[:, : self.steps], vectors[:, self.steps :]
        elif quick:
            velocities, moves = fold(velocities, SKETCH), fold(moves, SKETCH)
            deltas = None if deltas is None else fold(deltas, SKETCH)
        latents = np.pad(np.cumsum(moves, axis=1), ((0, 0), (1, 0), (0, 0)))
        self.velocities = np.ascontiguousarray(velocities.swapaxes(0, 1))
        self.latents = np.ascontiguousarray(latents.swapaxes(0, 1))
        self.groups = None if deltas is None else GroupCells(stats, deltas, predictor, quick)
        measured = self.groups is not None and self.joint and len(stats.response_sigmas) > 0
        self.responses = Responses(stats) if measured else None
        self._velocities: dict[tuple[int, Cells], tuple[FloatArray, FloatArray]] = {}
        empty = np.zeros((0, 3, *self.velocities.shape[1:]))
        self._none = Passed(empty, empty[..., 0], -1)
        self._rises: dict[tuple[int, int], float] = {}
        self._trails: list[list[tuple[Stretch, State]]] = []

    def fit(self, computed: BoolArray) -> Fit:
        """Taps of a schedule, and the error that they leave."""
        stretches = self.stretches(computed)
        trail = self._walk(stretches)
        taps: list[tuple[float, ...]] = [()] * self.steps
        cells: tuple[dict[int, Cell], ...] = tuple({} for _ in range(computed.shape[1] - 1))
        for stretch, state in trail:
            taps[stretch.start] = state.taps
            for group, sources in stretch.cells:
                assert self.groups is not None
                cells[group][stretch.start] = self.groups.cell(stretch.start, group, sources)
        return Fit(computed, tuple(taps), cells, self._error(trail[-1][1]))

    def score(self, computed: BoolArray) -> float:
        """The score of a schedule, rounded so that machines agree on it."""
        return round(mean_log10(self._error(self._walk(self.stretches(computed))[-1][1])), 6)

    def relief(self, computed: BoolArray, more: BoolArray) -> float:
        """What one more computed cell takes away by itself, rounded: log10 of its squared error."""
        ((step, column), *_) = np.argwhere(more & ~computed).tolist()
        if column == 0:
            anchor = int(np.flatnonzero(computed[:step, 0])[-1])
            moved = self.velocities[anchor] - self.velocities[step]
            size = np.einsum("pn,pn->p", moved, moved)
        else:
            assert self.groups is not None
            done = np.flatnonzero(computed[:step, column]).tolist()
            sources = self.groups.sources(step, done, self.depth)
            size = self.groups.cell(step, column - 1, sources).size ** 2
        length = self.sigmas[step + 1] - self.sigmas[step]
        square = float(size.mean()) * (length * self.growth[step]) ** 2
        return round(float(np.log10(max(square, 1e-300))), 6)

    def stretches(self, computed: BoolArray) -> list[Stretch]:
        """The rows of a schedule."""
        starts = np.flatnonzero(computed[:, 0]).tolist()
        stops = [*starts[1:], self.steps]
        done: list[list[int]] = [[] for _ in range(computed.shape[1] - 1)]
        found, moved, rows = [], self.twice, computed[:, 1:].tolist()
        for start, stop in zip(starts, stops, strict=True):
            if self.begins[start]:
                done = [[] for _ in done]
            cells = []
            for group, (own, before) in enumerate(zip(rows[start], done, strict=True)):
                if own:
                    before.append(start)
                else:
                    assert self.groups is not None
                    cells.append((group, self.groups.sources(start, before, self.depth)))
            moved = moved or stop > start + 1 or (self.euler and bool(cells))
            found.append(Stretch(start, stop, tuple(cells), moved))
        return found

    def _error(self, state: State) -> FloatArray:
        """(P,) squared error per element: the geometric mean of growth along and turned."""
        along, turned = np.einsum("kpn,kpn->kp", state.error, state.error) + state.drift
        error: FloatArray = np.sqrt(along * turned) * (self.growth[-1] ** 2 / self.numel)
        return error

    def _walk(self, stretches: Sequence[Stretch]) -> list[tuple[Stretch, State]]:
        """The states after each stretch; those that a schedule seen before shares are kept."""
        best: list[tuple[Stretch, State]] = []
        for trail in self._trails:
            shared = 0
            for (known, _), stretch in zip(trail, stretches, strict=False):
                if known != stretch:
                    break
                shared += 1
            if shared > len(best):
                best, used = trail[:shared], trail
        if best:
            self._trails.remove(used)
            self._trails.insert(0, used)
        if best:
            state = best[-1][1]
        else:
            prompts, size = self.velocities.shape[1:]
            state = State(np.zeros((2, prompts, size)), np.zeros((2, prompts)), self._none)
        trail = list(best)
        for stretch in stretches[len(best) :]:
            state = self._advance(state, stretch)
            trail.append((stretch, state))
        self._trails.insert(1, trail)
        del self._trails[_TRAILS:]
        return trail

    def _velocity(
        self, start: int, cells: Cells, before: Mapping[int, FloatArray]
    ) -> tuple[FloatArray, FloatArray, Mapping[int, FloatArray]]:
        """U (P, N) of a computed step, I (P,), and x of the steps that can still be read."""
        if self.responses is None or not cells:
            return *self._alone(start, cells), before
        assert self.groups is not None
        found = [(g, sources, self.groups.cell(start, g, sources)) for g, sources in cells]
        changes, unsure = self.responses.changes(start, found, before)
        kept = {s: x for s, x in before.items() if s >= start - self.groups.max_lag}
        return self.velocities[start] + changes.sum(axis=0), unsure, {**kept, start: changes}

    def _alone(self, start: int, cells: Cells) -> tuple[FloatArray, FloatArray]:
        """The same where responses were not measured."""
        key = start, cells
        if key not in self._velocities:
            velocity, prompts = self.velocities[start], self.velocities.shape[1]
            sizes: FloatArray = np.zeros(prompts)
            squares: FloatArray = np.zeros(prompts)
            for group, sources in cells:
                assert self.groups is not None
                cell = self.groups.cell(start, group, sources)
                sizes = sizes + cell.size
                if self.joint:
                    velocity = velocity + cell.delta
                    squares = squares + cell.size**2
            self._velocities[key] = velocity, np.maximum(sizes**2 - squares, 0.0)
        return self._velocities[key]

    def _advance(self, state: State, stretch: Stretch) -> State:
        start, stop = stretch.start, stretch.stop
        length = self.sigmas[stop] - self.sigmas[start]
        grown = self.growth[start] / self.growth[stop]
        velocity, unsure, changes = self._velocity(start, stretch.cells, state.changes)
        own = length * velocity
        if stretch.moved:
            own -= self.latents[stop] - self.latents[start]
        else:
            own -= length * self.velocities[start]
        error = state.error + own
        error[0] += (grown - 1) * state.error[0]
        drift = grown**2 * state.drift
        drift[1] += (grown**2 - 1) * np.einsum("pn,pn->p", state.error[1], state.error[1])
        earlier = self._none if self.begins[start] else state.passed
        count, (_, prompts, size) = len(earlier.vectors), state.error.shape
        here = np.concatenate([velocity[None], state.error])
        known = np.concatenate([unsure[None], state.drift])
        passed = self._none
        if self.depth:
            vectors, sizes = earlier.vectors[: self.depth - 1], earlier.sizes[: self.depth - 1]
            passed = Passed(
                np.concatenate([here[None], vectors]), np.concatenate([known[None], sizes]), start
            )
        if not stretch.moved or not count or self.predictor == "reuse":
            return State(error, drift + length**2 * unsure, passed, changes=changes)
        between = here - earlier.vectors
        moves = length * between[:, 0]
        prior: FloatArray = np.zeros(count)
        prior[0] = self._prior(stretch, earlier.last)
        taps = prior
        if self.predictor == "fitted":
            taps = self._taps(error[0] + prior[0] * moves[0], moves, prior, velocity, length)
        error += (taps @ moves.reshape(count, -1)).reshape(prompts, size)
        apart = np.einsum("hkpn,hkpn->hkp", between[:, 1:], between[:, 1:])
        apart += known[1:] + earlier.sizes[:, 1:]
        apart *= self.rate**2
        apart += earlier.sizes[:, :1]
        doubt = (taps**2 @ apart.reshape(count, -1)).reshape(drift.shape)
        drift += length**2 * ((1 + taps.sum()) ** 2 * unsure + doubt)
        return State(error, drift, passed, tuple(taps.tolist()) if taps.any() else (), changes)

    def _prior(self, stretch: Stretch, before: int) -> float:
        """The published predictor's tap: the mean of its predictions over the stretch."""
        sigmas, start, stop = self.sigmas, stretch.start, stretch.stop
        key = start, stop
        if key not in self._rises:
            rise = np.diff(sigmas[start : stop + 1]) @ (sigmas[start:stop] - sigmas[start])
            self._rises[key] = float(rise / (sigmas[stop] - sigmas[start]))
        return self._rises[key] / float(sigmas[start] - sigmas[before])

    def _taps(
        self,
        rest: FloatArray,
        moves: FloatArray,
        prior: FloatArray,
        velocity: FloatArray,
        length: float,
    ) -> FloatArray:
        if self.quick:
            return quick_fit(rest, moves, prior)
        loud = length**2 * np.einsum("pn,pn->p", velocity, velocity)
        return np.round(LeastSquares.of(rest, moves, prior, loud).fit(), DECIMALS)


def moves_as_euler(stats: CalibrationStats) -> bool:
    """Whether the sampler moves by (sigma_{t+1} - sigma_t) v_t, whatever its latents round to."""
    name = stats.setting.get("scheduler")
    if isinstance(name, str):
        return "Euler" in name
    moved = np.diff(stats.latents.astype(np.float64), axis=1)
    off = moved - np.diff(stats.sigmas)[:, None] * stats.velocities
    return bool((np.abs(off).max(axis=(0, 2)) <= 1e-3 * np.abs(moved).max(axis=(0, 2))).all())


def mean_log10(error: FloatArray) -> float:
    """Mean log10 of squared errors: up to constants, the mean PSNR.

    Each error counts as at least 1e-12 of the largest, or one prompt without any would decide
    alone. Minus infinity if none has any.

    Example:
        >>> round(mean_log10(np.array([1e-2, 1e-4])), 6)
        -3.0
    """
    largest = float(error.max())
    if largest <= 0:
        return -np.inf
    return float(np.log10(np.maximum(error, 1e-12 * largest)).mean())


def predicted_psnr(stats: CalibrationStats, error: FloatArray) -> FloatArray:
    """(P,) PSNR in dB of images in [0, 1] against the uncached ones; infinite without error."""
    with np.errstate(divide="ignore"):
        result: FloatArray = -10 * np.log10(stats.image_gain * error)
    return result
