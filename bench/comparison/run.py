"""The whole bench: calibrate, tune on validation prompts, measure on held-out ones, report."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.comparison.entrants import Entrant, Family
from bench.comparison.field import FIELD
from bench.comparison.goals import goals
from bench.comparison.inputs import GROUPS, PUBLISHED_GROUPS, Inputs
from bench.comparison.lpips import Lpips, load_lpips
from bench.comparison.measuring import BLOCK, Clock, Measuring
from bench.comparison.metrics import ms_ssim_scales
from bench.comparison.page import bench_page
from bench.comparison.pictures import equal_speed_sheet, speed_curves
from bench.comparison.results import ScenarioResult
from bench.comparison.scenario import BenchSize, Scenario
from bench.comparison.store import Store, fingerprint
from bench.comparison.tables import markdown
from bench.comparison.tuning import Validation, tune
from bench.peers.cachedit import cache_dit_version
from layercache._write import write_file
from layercache.errors import LayerCacheError
from layercache.evaluation._latency import run_once
from layercache.evaluation.methods import Uncached

Log = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class BenchResult:
    """What the bench found, and the files that it wrote."""

    results: tuple[ScenarioResult, ...]
    files: tuple[Path, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `rows` holds those of all scenarios."""
        return {
            "rows": [row for result in self.results for row in result.rows()],
            "scenarios": [
                result.to_dict()
                | {"goals": [asdict(goal) | {"met": goal.met} for goal in goals(result)]}
                for result in self.results
            ],
        }


def run_bench(
    out: Path,
    scenarios: Sequence[Scenario],
    size: BenchSize,
    *,
    methods: Sequence[str] | None = None,
    weights: Path | None = None,
    lpips: Path | None = None,
    results: Path | None = None,
    clock: Clock = "wall",
    command: str = "python -m bench",
    log: Log = lambda text: None,
    progress: bool = True,
) -> BenchResult:
    """Run the bench, or go on with one that was stopped, and write what it found.

    Args:
        out: Folder of everything: kept measurements, pictures, `results.json`, `report.html`.
        scenarios: Ways to use the model, one after another.
        size: How much to do.
        methods: Names out of `FIELD`; None is all.
        weights: Folder of other weights of the reference model.
        lpips: Folder with LPIPS weights; without it LPIPS is left out.
        results: Folder for `RESULTS.md` and `results.json`; None is `out`.
        clock: What times are read from; see `Measuring`.
        command: As it stands in the written results.
        log: Receives a line at the start of every stage.
        progress: Show progress bars on stderr.

    Raises:
        LayerCacheError: A method is unknown.
    """
    began = time.perf_counter()
    unknown = sorted(set(methods or ()) - set(FIELD))
    if unknown:
        raise LayerCacheError(f"unknown method {unknown[0]!r}; there are {', '.join(FIELD)}")
    families = [family for name, family in FIELD.items() if methods is None or name in methods]
    metric = _lpips(lpips, log)
    found: list[ScenarioResult] = []
    pictures: dict[str, bytes] = {}
    for scenario in scenarios:
        log(f"scenario {scenario.name}: {scenario.title}")
        runner = _Runner(out, scenario, size, families, weights, metric, clock, log, progress)
        found.append(runner.run())
        pictures |= runner.pictures(found[-1])
    result = BenchResult(tuple(found), (), time.perf_counter() - began)
    text = json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n"
    contents = {out / f"{name}.png": png for name, png in pictures.items()}
    contents[out / "report.html"] = bench_page(found, pictures).encode()
    for folder in dict.fromkeys((out, results or out)):
        contents[folder / "results.json"] = text.encode()
        contents[folder / "RESULTS.md"] = markdown(found, command).encode()
    for path, data in contents.items():
        write_file(path, data)
    return BenchResult(tuple(found), tuple(contents), time.perf_counter() - began)


class _Runner:
    """One scenario."""

    def __init__(
        self,
        out: Path,
        scenario: Scenario,
        size: BenchSize,
        families: Sequence[Family],
        weights: Path | None,
        metric: Lpips | None,
        clock: Clock,
        log: Log,
        progress: bool,
    ) -> None:
        self.scenario, self.size, self.families = scenario, size, families
        self.log, self.progress = log, progress
        pipe = scenario.load(weights)
        store = Store(out / scenario.name, fingerprint(scenario, pipe))
        self.inputs = Inputs(pipe, scenario, size, store, log, progress)
        self.skipped: dict[str, str] = {}
        self.entrants: list[Entrant] = []
        self.bar: Any = None
        self.measuring = Measuring(
            pipe,
            store,
            scenario.work("held-out", size.held_out, size.batch),
            rounds=size.rounds,
            clock=clock,
            lpips=metric,
            foreign=frozenset(family.name for family in families if family.foreign),
            on_failure=self._skip,
            tick=lambda count: self.bar.update(count),
        )

    def run(self) -> ScenarioResult:
        self._announce()
        validation = Validation(self.inputs)
        for family in self.families:
            self.entrants += self._prepared(family, validation)
        total = len(self.entrants) * len(self.measuring.batches) * self.size.rounds
        self.log(f"measuring {len(self.entrants)} settings on {self.size.held_out} prompts")
        with tqdm(total=total, unit="run", desc="measure", disable=not self.progress) as self.bar:
            self.measuring.run(self.entrants)
        curves = self.measuring.curves(self.entrants)
        return ScenarioResult(
            scenario=self.scenario,
            curves=curves,
            targets=self.size.targets,
            skipped=self.skipped,
            facts=self._facts(),
            uncached_seconds=statistics.median(self.measuring.uncached_seconds(self.entrants)),
        )

    def pictures(self, result: ScenarioResult) -> dict[str, bytes]:
        """PNG bytes by name."""
        named = {(entrant.family, entrant.label): entrant for entrant in self.entrants}
        sheet = equal_speed_sheet(
            result,
            self.measuring.references(),
            lambda family, label: self.measuring.images(named[family, label]),
            self.scenario.prompts("held-out", self.size.held_out),
        )
        made = {f"curves-{self.scenario.name}": speed_curves(result.curves, result.targets)}
        return made if sheet is None else made | {f"sheet-{self.scenario.name}": sheet}

    def _prepared(self, family: Family, validation: Validation) -> list[Entrant]:
        """Its entrants, tuned where it has settings; none where it cannot run."""
        try:
            entrants = family.build(self.inputs)
            if family.tuned:
                self.log(f"tuning {family.name}: {len(entrants)} settings on validation prompts")
                entrants = tune(validation, entrants, family.foreign)
        except Exception as error:
            if not family.foreign:
                raise
            self._skip(family.name, error)
            return []
        return entrants

    def _skip(self, family: str, error: Exception) -> None:
        known = isinstance(error, LayerCacheError)
        self.skipped[family] = str(error) if known else f"{type(error).__name__}: {error}"
        self.log(f"{family} is left out: {self.skipped[family]}")

    def _announce(self) -> None:
        """Time one uncached batch and say how long the rest will take."""
        batch = self.measuring.batches[0]
        run_once(self.inputs.pipe, Uncached(), batch)
        seconds = run_once(self.inputs.pipe, Uncached(), batch).seconds
        minutes = seconds * self._batches_ahead() / 60
        self.log(
            f"an uncached batch of {len(batch.ids)} takes {seconds:.1f} s; this scenario about "
            f"{minutes:.0f} minutes on an idle machine, less what is kept from an earlier run"
        )

    def _batches_ahead(self) -> float:
        """Rough amount of work, in uncached batches."""
        size, steps = self.size, self.scenario.steps
        shares = [count / steps for count in self.inputs.size.fresh_steps(steps)]
        names = {family.name for family in self.families}
        # A replay computes from its group to the end, half of the model on average.
        replays = sum(
            5 + groups * size.lags / 2
            for name, groups in (("layercache", GROUPS), ("layercache-published", PUBLISHED_GROUPS))
            if name in names
        )
        calibration = replays * size.calibration / size.batch
        tried = sum(17 if f.foreign else 30 for f in self.families if f.tuned) * size.grid
        tuning = 0.5 * tried * size.validation / size.batch
        fits = 3 * sum(shares) * size.calibration / size.batch if "non-stationary" in names else 0
        settings = len(self.families) * len(shares)
        timed = len(self.families) * sum(shares) * 1.1 + settings / BLOCK + 2
        return calibration + tuning + fits + timed * size.rounds * size.held_out / size.batch

    def _facts(self) -> dict[str, str]:
        size, scenario = self.size, self.scenario
        config = self.inputs.pipe.transformer.config
        image = self.measuring.references()[0]
        scales = ms_ssim_scales(image.shape[1], image.shape[2])
        seconds = self.measuring.uncached_seconds(self.entrants)
        low, high = (seconds[round(part * (len(seconds) - 1))] for part in (0.1, 0.9))
        clock = "wall clock" if self.measuring.clock == "wall" else "processor time"
        return {
            "Model": f"{type(self.inputs.pipe.transformer).__name__}, {config.num_layers} blocks, "
            f"the reference model, float32, {scenario.title}",
            "Prompts": f"{size.calibration} to fit to, {size.validation} to choose settings on, "
            f"{size.held_out} held out and reported; one seed each",
            "Timing": f"batches of {size.batch}, warm, {size.rounds} round(s), an uncached run "
            f"before and after every {BLOCK} settings; {clock}, median over batches and rounds",
            "Uncached batch": f"{statistics.median(seconds):.2f} s, eight in ten within "
            f"{low:.2f} to {high:.2f} s: how quiet the machine was",
            "MS-SSIM": f"{scales} scales" if scales > 1 else "left out: the images are too small",
            "Versions": f"torch {torch.__version__}, Python {platform.python_version()}, "
            f"cache-dit {cache_dit_version() or 'not installed'}",
            "Machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        }


def _lpips(folder: Path | None, log: Log) -> Lpips | None:
    if folder is None:
        log("LPIPS is skipped: no folder with its weights was named (--lpips)")
        return None
    try:
        return load_lpips(folder)
    except LayerCacheError as error:
        log(str(error))
        return None
