"""`CalibrationStats`: what one calibration measured.

Shape suffixes: P prompts, T steps, G groups, M lags, S sketch size.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layercache._write import write_file
from layercache.errors import ModelMismatchError, StatsError
from layercache.stats._difference import difference
from layercache.stats._file import archive_bytes, read_archive
from layercache.stats._group import Group
from layercache.stats._validation import ARRAYS, SHARED, check_stats, require_each

__all__ = [
    "SCHEMA_VERSION",
    "CalibrationStats",
    "FloatArray",
    "Group",
    "difference",
    "merge_all",
]

FloatArray = NDArray[np.floating[Any]]

SCHEMA_VERSION = 4
"""Versions 1 to 3 were drafts that no release wrote."""
_WHOLE = ("branches", "velocity_bytes", "output_bytes", "numel", "probes", "passes", "sketch_seed")


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationStats:
    """Sketched velocities and velocity deltas of P prompts, with times and bytes.

    The velocity delta D[t, g, lag] is the change of the guided model output at step t when group g
    adds the residual it had at step t - lag instead of its own. Vectors are stored as linear
    sketches with one seed, so inner products between any two of them are kept. In mode
    `"residual"` D is a stand-in, the scaled difference of the group's residuals, with directions
    of its own: inner products are kept within a group only.

    Attributes:
        sigmas: (T+1,) noise levels, strictly falling, the last one 0.
        groups: The G groups, in execution order; none where only whole steps can be cached.
        branches: Most transformer calls a step (2 for sequential classifier-free guidance).
        velocities: (P, T, S) float32, sketches of the guided output of each step.
        latents: (P, T+1, S) float32, sketches of the latents that the scheduler received, and
            of the last one that it made. If not given, those of Euler's method, from z_0 = 0.
        deltas: (P, T, G, M, S) float32, sketches of D; zero where t - lag < 0.
        responses: (P, K, G(G-1)/2, 3) float64, what a later group answers to an earlier one, at K
            steps and for every two groups h < g: with D_hg the change when both add their residuals
            of one step ago, the response is R = D_h + D_g - D_hg, and the numbers are <R, D_h>,
            ||R||^2 and ||D_h||^2. K is 0 where it was not measured.
        response_sigmas: (K,) the noise levels of those steps.
        loads: (T, G+1) float64, how much each group, then the rest of the transformer, has to do at
            each step: a share of the fullest step, counted in elements of its inputs. Less than 1
            where calls are missing (guidance that sets in late, skipped layers), 0 at steps that
            another transformer makes. All 1 if not given.
        segments: (T,) float64 whole numbers from 0: steps of one number follow one another and call
            the transformer alike (as many calls, of the same shapes). Nothing is predicted across
            a change, so the first step of each is computed. All 0 if not given.
        times_ms: (P, G+2) float64, milliseconds a full step of each group (all branches, the whole
            batch that the prompt was measured in), then of what a computed step spends outside the
            groups, then of what every step spends outside the transformer.
        image_gain: (P,) mean squared pixel change (images in [0, 1]) per mean squared change of the
            final latent.
        amplification: (P, T) how many times longer an error that is made at step t is once it has
            reached the final latent; all 1 where it was not measured.
        group_bytes: (G,) bytes of one stored residual of each group, all branches, per image; of
            the longest prompt.
        velocity_bytes: Bytes of one stored guided output, per image.
        output_bytes: Bytes of the transformer's outputs of one step, all branches, per image.
        numel: Elements of the guided output, per image.
        sketch_seed: Seed of the sketch.
        prompt_ids: P identifiers, each a digest of a prompt and its seed; sorted, all different.
        model: Hard fingerprint: transformer class, block lists, architecture hash.
        setting: Soft fingerprint: scheduler, guidance, resolution, dtype and so on.
        component: Attribute of the pipeline that was calibrated.
        mode: `"replay"` if velocity deltas were measured, `"residual"` if residuals stand in.
        passes: How often the uncached run makes the calls of a step: 2 under Heun's method, for all
            steps but the last. A plan makes them once at each step that it computes.
        probes: Perturbed runs asked for to measure `amplification`, fewer in runs of a few steps;
            0 if it was not measured.

    Example:
        >>> stats = CalibrationStats.load("stats.npz")  # doctest: +SKIP
        >>> stats.num_steps, stats.num_groups  # doctest: +SKIP
        (50, 4)
    """

    sigmas: FloatArray
    groups: tuple[Group, ...]
    branches: int
    velocities: FloatArray
    deltas: FloatArray
    times_ms: FloatArray
    image_gain: FloatArray
    group_bytes: tuple[int, ...]
    velocity_bytes: int
    output_bytes: int
    numel: int
    sketch_seed: int
    prompt_ids: tuple[str, ...]
    model: dict[str, Any]
    setting: dict[str, Any]
    amplification: FloatArray = field(default_factory=lambda: np.zeros((0, 0)))
    latents: FloatArray = field(default_factory=lambda: np.zeros((0, 0, 0)))
    loads: FloatArray = field(default_factory=lambda: np.zeros((0, 0)))
    segments: FloatArray = field(default_factory=lambda: np.zeros(0))
    responses: FloatArray = field(default_factory=lambda: np.zeros((0, 0, 0, 0)))
    response_sigmas: FloatArray = field(default_factory=lambda: np.zeros(0))
    component: str = "transformer"
    mode: str = "replay"
    probes: int = 0
    passes: int = 1

    def __post_init__(self) -> None:
        if self.amplification.size == 0:
            ones = np.ones(self.velocities.shape[:2])
            object.__setattr__(self, "amplification", ones)
        steps = max(self.sigmas.size - 1, 0)
        if self.loads.size == 0:
            object.__setattr__(self, "loads", np.ones((steps, len(self.groups) + 1)))
        if self.segments.size == 0:
            object.__setattr__(self, "segments", np.zeros(steps))
        if self.latents.size == 0:
            object.__setattr__(self, "latents", euler_latents(self.sigmas, self.velocities))
        if self.responses.size == self.response_sigmas.size == 0:
            count = len(self.groups)
            none = np.zeros((len(self.velocities), 0, count * (count - 1) // 2, 3))
            object.__setattr__(self, "responses", none)
        check_stats(self)
        for name in ARRAYS:
            getattr(self, name).setflags(write=False)

    @property
    def num_prompts(self) -> int:
        """P."""
        return int(self.velocities.shape[0])

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.sigmas) - 1

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.groups)

    @property
    def max_lag(self) -> int:
        """M."""
        return int(self.deltas.shape[3])

    @property
    def identity(self) -> dict[str, Any]:
        """What statistics must share to be merged."""
        return {
            "mode": self.mode,
            "model": self.model,
            "groups": [group.name for group in self.groups],
            "lags": self.max_lag,
            "probes": self.probes,
            "sketch_seed": self.sketch_seed,
            "sketch_size": int(self.velocities.shape[2]),
            "setting": self.setting,
            "component": self.component,
            "sigmas": tuple(float(sigma) for sigma in self.sigmas),
            "loads": tuple(float(load) for load in self.loads.ravel()),
            "segments": tuple(float(segment) for segment in self.segments),
            "branches": self.branches,
            "passes": self.passes,
            "numel": self.numel,
        }

    @property
    def prompts_sha256(self) -> str:
        """One digest of all prompts and their seeds."""
        return hashlib.sha256("".join(self.prompt_ids).encode()).hexdigest()

    @property
    def group_ms(self) -> FloatArray:
        """(G,) median milliseconds a step of each group, all branches."""
        result: FloatArray = np.median(self.times_ms[:, :-2], axis=0)
        return result

    @property
    def rest_ms(self) -> float:
        """Median milliseconds a computed step spends in the transformer outside the groups."""
        return float(np.median(self.times_ms[:, -2]))

    @property
    def overhead_ms(self) -> float:
        """Median milliseconds every step spends outside the transformer."""
        return float(np.median(self.times_ms[:, -1]))

    @property
    def propagation(self) -> FloatArray:
        """(T,) weight of an error made at step t in the final one, falling in t.

        The geometric mean of `amplification` over prompts (a few prompts amplify a hundred times
        more than the others), raised to its largest later value so that it never grows again.
        """
        mean = np.log(self.amplification.astype(np.float64)).mean(axis=0)
        result: FloatArray = np.exp(np.maximum.accumulate(mean[::-1])[::-1])
        return result

    def to_bytes(self) -> bytes:
        """The contents of the file."""
        meta: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "groups": [asdict(group) for group in self.groups],
        }
        for name in _meta_fields():
            meta[name] = getattr(self, name)
        return archive_bytes({name: getattr(self, name) for name in ARRAYS}, meta)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file: a reader sees the old one or the whole new one, and links stay."""
        write_file(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CalibrationStats:
        """Read and validate a file.

        Raises:
            StatsError: The file is missing, truncated, malformed, compressed, of a newer version,
                or holds NaN.
        """
        arrays, meta = read_archive(path, ARRAYS)
        return _built(arrays, meta, str(path))

    def merge(self, other: CalibrationStats) -> CalibrationStats:
        """Statistics of both sets of prompts; the same whatever the order or the split.

        Raises:
            ModelMismatchError: Something other than the prompts differs; the message names it and
                both values.
            StatsError: A prompt stands in both.
        """
        return merge_all([self, other])

    def select(self, indices: list[int]) -> CalibrationStats:
        """The same statistics with only some prompts (positions in `prompt_ids`)."""
        kept = sorted(set(indices))
        return CalibrationStats(
            groups=self.groups,
            prompt_ids=tuple(self.prompt_ids[i] for i in kept),
            **{name: getattr(self, name) for name in SHARED},
            **{name: getattr(self, name)[kept] for name in ARRAYS if name not in SHARED},
            **{name: getattr(self, name) for name in _meta_fields() if name != "prompt_ids"},
        )

    def summary(self) -> str:
        """A few lines for a person."""
        full = float(self.group_ms.sum()) + self.rest_ms
        lines = [
            f"CalibrationStats of {self.model.get('class_name', '?')}, {self.mode} mode",
            f"  prompts {self.num_prompts}, steps {self.num_steps}, groups {self.num_groups}, "
            f"lags {self.max_lag}, sketch {self.velocities.shape[2]}",
            f"  a step: {full:.2f} ms in the transformer, {self.overhead_ms:.2f} ms outside it",
        ]
        if self.num_steps < 2:
            return "\n".join(lines)
        for index, group in enumerate(self.groups):
            norm = float(np.sqrt((self.deltas[:, 1:, index, 0] ** 2).sum(-1)).mean())
            speed = float(np.sqrt((self.velocities[:, 1:] ** 2).sum(-1)).mean())
            lines.append(
                f"  {group.name:<32} {self.group_ms[index]:8.2f} ms   "
                f"delta at lag 1: {100 * norm / max(speed, 1e-30):.3f} % of the velocity"
            )
        return "\n".join(lines)


def merge_all(parts: Sequence[CalibrationStats]) -> CalibrationStats:
    """Statistics of all prompts of several parts; see `CalibrationStats.merge`."""
    if not parts:
        raise StatsError("there are no statistics to merge")
    first, ids = parts[0], [identity for part in parts for identity in part.prompt_ids]
    for part in parts[1:]:
        found = difference(first.identity, part.identity)
        if found:
            raise ModelMismatchError(f"cannot merge statistics: {found}")
    twice = sorted(identity for identity, count in Counter(ids).items() if count > 1)
    if twice:
        raise StatsError(
            f"cannot merge statistics: {len(twice)} prompts stand in more than one part, the "
            f"first is {twice[0]}; merge each file once"
        )
    order = sorted(range(len(ids)), key=ids.__getitem__)

    def joined(name: str) -> Any:
        rows: FloatArray = np.concatenate([getattr(part, name) for part in parts])[order]
        return rows

    same = {name: getattr(first, name) for name in _meta_fields()}
    # A longer prompt has larger text residuals, and plans are made for the largest.
    sizes = zip(*(part.group_bytes for part in parts), strict=True)
    same["group_bytes"] = tuple(max(size) for size in sizes)
    for name in ("velocity_bytes", "output_bytes"):
        same[name] = max(getattr(part, name) for part in parts)
    same["prompt_ids"] = tuple(ids[i] for i in order)
    return CalibrationStats(
        groups=first.groups,
        **{name: getattr(first, name) for name in SHARED},
        **{name: joined(name) for name in ARRAYS if name not in SHARED},
        **same,
    )


def euler_latents(sigmas: FloatArray, velocities: FloatArray) -> FloatArray:
    """(P, T+1, S) latents that Euler's method makes of velocities (P, T, S), from z_0 = 0."""
    if velocities.ndim != 3 or sigmas.shape != (velocities.shape[1] + 1,):
        return np.zeros((0, 0, 0), dtype=np.float32)  # refused by the validation that follows
    moves = np.diff(sigmas)[:, None] * velocities.astype(np.float64)
    latents = np.pad(np.cumsum(moves, axis=1), ((0, 0), (1, 0), (0, 0)))
    return latents.astype(np.float32)


def _meta_fields() -> tuple[str, ...]:
    return (
        "branches",
        "group_bytes",
        "velocity_bytes",
        "output_bytes",
        "numel",
        "sketch_seed",
        "prompt_ids",
        "model",
        "setting",
        "component",
        "mode",
        "probes",
        "passes",
    )


def _built(arrays: dict[str, Any], meta: dict[str, Any], path: str) -> CalibrationStats:
    version = meta.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise StatsError(
            f"{path}: statistics of schema version {version!r}; this LayerCache reads version "
            f"{SCHEMA_VERSION}: upgrade LayerCache or calibrate again"
        )
    for name in ARRAYS:
        if arrays[name].dtype.kind != "f":
            raise StatsError(f"{path}: {name} has dtype {arrays[name].dtype}, not a float")
    try:
        groups = tuple(Group(**group) for group in meta.pop("groups"))
        fields = {name: meta.pop(name) for name in _meta_fields()}
        model = fields["model"]
        names = [model["class_name"], model["architecture"]]
        blocks = list(model["block_lists"].values())
    except (AttributeError, KeyError, TypeError) as error:
        raise StatsError(f"{path}: its metadata is malformed ({error!r})") from error
    whole = {name: [fields[name]] for name in _WHOLE}
    for name, values in {**whole, "group_bytes": fields["group_bytes"]}.items():
        require_each(path, name, values, int)
    require_each(path, "model.block_lists", blocks, int)
    for name, values in {"model": names, "prompt_ids": fields["prompt_ids"]}.items():
        require_each(path, name, values, str)
    require_each(path, "component", [fields["component"]], str)
    require_each(path, "setting", [fields["setting"]], dict)
    for name in ("group_bytes", "prompt_ids"):
        fields[name] = tuple(fields[name])
    if meta:
        raise StatsError(f"{path}: unknown metadata {sorted(meta)}")
    return CalibrationStats(groups=groups, **arrays, **fields)
