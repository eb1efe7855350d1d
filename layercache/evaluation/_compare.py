"""Every method at every target, on the same prompts and seeds, in one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from tqdm import tqdm

from layercache.calibration.prompts import Batch
from layercache.evaluation._latency import time_interleaved
from layercache.evaluation.methods import Method, Uncached
from layercache.evaluation.metrics import fidelity
from layercache.models.pipelines import decodes

_TOO_FAST = 1.25
"""A speedup so many times what the saved compute allows was not measured, but mistimed."""
_TOO_SLOW = 0.5


@dataclass(frozen=True)
class Row:
    """One method at one target.

    `target_speedup` is in equal compute: the method may spend 1 / target of the full transformer
    compute. `speedup_measured` is the median time of the uncached run over the method's median
    time; `speedup_predicted` is None where nothing predicts it. PSNR in dB against the uncached
    images or videos; SSIM is None where nothing was decoded.
    """

    method: str
    target_speedup: float
    compute_share: float
    speedup_measured: float
    speedup_predicted: float | None
    psnr_mean: float
    psnr_worst: float
    psnr_median: float
    ssim_mean: float | None

    @property
    def timing_doubt(self) -> str | None:
        """Why `speedup_measured` cannot be right; None if it can.

        Even if nothing but the transformer took time, a share s of its compute makes a generation
        at most 1/s times faster; and what is slower than the uncached run and takes twice as long
        as its share says was disturbed.
        """
        share, speedup = self.compute_share, self.speedup_measured
        if speedup < 1 and speedup * share < _TOO_SLOW:
            return (
                f"{speedup:.2f}x, where {100 * share:.0f} % of the compute promise {1 / share:.2f}x"
            )
        if share > 0 and speedup > _TOO_FAST / share:
            return (
                f"{speedup:.2f}x, where {100 * share:.0f} % of the compute allow {1 / share:.2f}x"
            )
        return None

    @property
    def speedup_text(self) -> str:
        """The measured speedup, if it can be right."""
        return "unclear" if self.timing_doubt else f"{self.speedup_measured:.2f}x"


@dataclass(frozen=True, eq=False)
class Comparison:
    """The table and the images behind it.

    Attributes:
        rows: By target, in the order in which the methods were given.
        references: (N, C, H, W) uncached images or (N, F, C, H, W) videos in [0, 1], or latents.
        images: The same of each (method, target).
        uncached_seconds: Median time of one uncached batch.
        batch_size: Images of the first batch.
        decoded: False where the pipeline has no decoder, so that latents were compared.
    """

    rows: tuple[Row, ...]
    references: Tensor
    images: Mapping[tuple[str, float], Tensor]
    uncached_seconds: float
    batch_size: int
    decoded: bool = True

    @property
    def targets(self) -> tuple[float, ...]:
        """The targets, in the order of the rows."""
        return tuple(dict.fromkeys(row.target_speedup for row in self.rows))

    def at(self, target: float) -> tuple[Row, ...]:
        """The rows of one target."""
        return tuple(row for row in self.rows if row.target_speedup == target)

    def table(self) -> str:
        """The rows as aligned text."""
        lines = [
            f"{'target':>6}  {'method':<21}{'compute':>8}{'speedup':>9}{'predicted':>11}"
            f"{'PSNR mean':>11}{'worst':>7}{'SSIM':>9}"
        ]
        for target in self.targets:
            lines.append("")
            for row in self.at(target):
                predicted = (
                    "-" if row.speedup_predicted is None else f"{row.speedup_predicted:.2f}x"
                )
                lines.append(
                    f"{f'{target:g}x':>6}  {row.method:<21}{100 * row.compute_share:>6.1f} %"
                    f"{row.speedup_text:>9}{predicted:>11}"
                    f"{row.psnr_mean:>8.1f} dB{row.psnr_worst:>7.1f}{_ssim(row):>9}"
                )
        if not self.decoded:
            lines += ["", "nothing is decoded: PSNR of latents, relative to their range"]
        if self.doubts:
            lines += ["", *self.doubts]
        return "\n".join(lines)

    @property
    def doubts(self) -> list[str]:
        """What is said of the rows whose timing cannot be right; nothing if there are none."""
        found = [
            f"unclear: {row.method} at {row.target_speedup:g}x was timed at {row.timing_doubt}"
            for row in self.rows
            if row.timing_doubt
        ]
        why = "Was the machine busy? Repeat it on a quiet one, with more repeats (--repeats)."
        return [*found, why] if found else []

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: `rows` and how they came about.

        `timing_doubt` of a row says why its measured speedup cannot be right, or is null.
        """
        return {
            "rows": [asdict(row) | {"timing_doubt": row.timing_doubt} for row in self.rows],
            "images": len(self.references),
            "batch_size": self.batch_size,
            "decoded": self.decoded,
            "uncached_seconds": self.uncached_seconds,
        }


def compare(
    pipe: Any,
    batches: Sequence[Batch],
    methods: Mapping[float, Sequence[Method]],
    *,
    repeats: int = 1,
    warm_up: bool = True,
    progress: bool = True,
) -> Comparison:
    """Run all methods on all batches and compare them with the uncached pipeline.

    `methods` are those of each target speedup (1 / share of compute). Each runs `repeats` times a
    batch, and its speed is the median.
    """
    flat = [(target, method) for target, group in methods.items() for method in group]
    entrants: list[Method] = [Uncached(), *(method for _, method in flat)]
    total = len(entrants) * len(batches) * repeats
    with tqdm(total=total, unit="run", desc="compare", disable=None if progress else True) as bar:
        timings = time_interleaved(
            pipe, batches, entrants, repeats=repeats, warm_up=warm_up, tick=bar.update
        )
    uncached, decoded = timings[0], decodes(pipe)
    rows, images = [], {}
    for (target, method), timing in zip(flat, timings[1:], strict=True):
        quality = fidelity(timing.images, uncached.images, decoded=decoded)
        rows.append(
            Row(
                method=method.name,
                target_speedup=target,
                compute_share=method.compute_share,
                speedup_measured=uncached.median_seconds / timing.median_seconds,
                speedup_predicted=method.predicted_speedup,
                psnr_mean=quality.psnr_mean,
                psnr_worst=quality.psnr_worst,
                psnr_median=quality.psnr_median,
                ssim_mean=quality.ssim_mean,
            )
        )
        images[method.name, target] = timing.images
    return Comparison(
        rows=tuple(rows),
        references=uncached.images,
        images=images,
        uncached_seconds=uncached.median_seconds,
        batch_size=len(batches[0].ids),
        decoded=decoded,
    )


def _ssim(row: Row) -> str:
    return "-" if row.ssim_mean is None else f"{row.ssim_mean:.4f}"
