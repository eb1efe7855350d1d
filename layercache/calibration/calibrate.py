"""`calibrate`: the entry point of calibration."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack, overload

from tqdm import tqdm

from layercache.calibration._estimate import CalibrationEstimate
from layercache.calibration._grouping import Groups, auto_count, split_groups
from layercache.calibration._options import Options, OptionValues
from layercache.calibration._parts import Parts, require_same
from layercache.calibration._replay import device_of
from layercache.calibration._segmentation import alike_groups
from layercache.calibration._session import Log, Session
from layercache.calibration.prompts import Batch, Prompt, batches
from layercache.calibration.sharding import Processes, Shard, is_main_process, take_shard
from layercache.errors import StatsError, UnsupportedModelError
from layercache.models.adapters import adapter_for, blocks_of
from layercache.models.pipelines import components_of
from layercache.models.stepping import calls_twice
from layercache.stats import CalibrationStats, Group, merge_all

_log: Log = logging.getLogger(__name__).info
_AUTO_PROMPTS = 2
_DENOISERS = ("transformer", "unet")
Components = str | Sequence[str]


@overload
def calibrate(
    pipe: Any,
    prompts: Sequence[Prompt],
    *,
    component: str | None = ...,
    groups: Groups = ...,
    call_kwargs: Mapping[str, Any] | None = ...,
    shard: Shard | None = ...,
    parts: str | os.PathLike[str] | None = ...,
    progress: bool = ...,
    log: Log = ...,
    **options: Unpack[OptionValues],
) -> CalibrationStats: ...


@overload
def calibrate(
    pipe: Any,
    prompts: Sequence[Prompt],
    *,
    component: Sequence[str],
    groups: Groups = ...,
    call_kwargs: Mapping[str, Any] | None = ...,
    shard: Shard | None = ...,
    parts: str | os.PathLike[str] | None = ...,
    progress: bool = ...,
    log: Log = ...,
    **options: Unpack[OptionValues],
) -> dict[str, CalibrationStats]: ...


def calibrate(
    pipe: Any,
    prompts: Sequence[Prompt],
    *,
    component: Components | None = None,
    groups: Groups = None,
    call_kwargs: Mapping[str, Any] | None = None,
    shard: Shard | None = None,
    parts: str | os.PathLike[str] | None = None,
    progress: bool = True,
    log: Log = _log,
    **options: Unpack[OptionValues],
) -> CalibrationStats | dict[str, CalibrationStats]:
    """Measure, per prompt, what `compile_plan` needs; once for every later budget and solver.

    For each prompt the pipeline runs at full compute, bit for bit as it would without calibration.
    At step t, group g is also replaced by the residual it had at step t - lag, for lag = 1..M,
    while earlier groups return what they returned and later ones compute; the change of the guided
    output is the velocity delta D[t, g, lag]. Velocities, latents and deltas are kept as sketches
    (`CountSketch`).

    In a process that `torchrun` or `accelerate launch` started, the prompts are split over the
    processes, and every process returns the statistics of all.

    Args:
        pipe: A diffusers pipeline, classic or modular, whose model predicts a velocity. Without an
            adapter for its transformer (or UNet) there are no groups: plans skip whole steps.
        prompts: Strings, or mappings of pipeline arguments (for pipelines without a text encoder).
            Four are enough for a useful plan.
        component: Which attribute of the pipeline is the denoiser, if not `transformer` or `unet`.
            Of a pipeline with two that take turns (Wan 2.2), name one, or both to calibrate both in
            one run.
        groups: How many groups of blocks, 0 for plans of whole steps only, or the groups; or text:
            a number, `"blocks"` (one a block), ranges such as `"0:4,4:28,28:32"`, or `"auto"` or
            `"auto:N"` for groups of neighbouring blocks with similar deltas, found on the first two
            prompts. None is 4, or as near to it as the blocks allow, and 0 without an adapter.
        call_kwargs: More pipeline arguments, such as guidance and resolution, as served. Noise
            follows from `seed` and prompt, so a `generator` among them is not used.
        shard: (i, n) measures only the i-th of n parts of the prompts, for job arrays.
        parts: A folder that gets one file a prompt as soon as it is measured. Prompts whose files
            are there already are not measured again. Several components have a folder each in it.
        progress: Show a progress bar on stderr.
        log: Gets the estimate of time and memory before the run starts.
        options: How to measure: the fields of `layercache.calibration.Options`, such as
            `num_inference_steps=50`, `lags=8`, `seed=0`, `batch_size=1`, `mode="replay"`.

    Returns:
        Statistics of the prompts, in the order of their identities; by component where several are
        named.

    Raises:
        UnsupportedModelError: Groups are asked for and the transformer has no adapter, or it is
            compiled as a whole.
        StatsError: The prompts, groups or options make no sense, the pipeline or its scheduler
            cannot be calibrated (the message says why, before anything is spent), the memory does
            not suffice, or the run overflowed.
        ModelMismatchError: `parts` holds files of another run.

    Example:
        >>> from layercache.reference import call_arguments, load_pipeline, prompts
        >>> arguments = call_arguments()
        >>> del arguments["generator"], arguments["num_inference_steps"]
        >>> stats = calibrate(
        ...     load_pipeline(), prompts("calibration", 1), num_inference_steps=4, lags=2,
        ...     call_kwargs=arguments, progress=False,
        ... )
        >>> stats.deltas.shape
        (1, 4, 4, 2, 1024)
    """
    asked = Options(**options)
    names = _names(pipe, component)
    arguments = _arguments(call_kwargs, asked)
    work = batches(prompts, asked.seed, asked.batch_size, arguments)
    folders = _folders(parts, names)
    processes = Processes(on_cpu=device_of(getattr(pipe, names[0])).type == "cpu")
    progress = progress and is_main_process()
    chosen = {
        name: _chosen_groups(pipe, name, prompts, groups, asked, arguments, folder, processes, log)
        for name, folder in folders.items()
    }
    session = Session(pipe, chosen, asked, arguments)
    mine = processes.split(take_shard(work, shard))
    found = processes.gather(_measure(session, mine, folders, progress, log))
    merged = {name: merge_all([each[name] for each in found]) for name in names}
    return merged[names[0]] if component is None or isinstance(component, str) else merged


def estimate_calibration(
    pipe: Any,
    prompts: Sequence[Prompt],
    *,
    component: Components | None = None,
    groups: Groups = None,
    call_kwargs: Mapping[str, Any] | None = None,
    **options: Unpack[OptionValues],
) -> CalibrationEstimate:
    """Time and memory that `calibrate` would take with the same arguments, from a few forwards.

    `"auto"` groups count as equal ones here.

    Raises:
        StatsError: As `calibrate`.

    Example:
        >>> from layercache.reference import load_pipeline, prompts
        >>> estimate = estimate_calibration(
        ...     load_pipeline(), prompts("calibration", 1), num_inference_steps=4, lags=2,
        ...     call_kwargs={"height": 32, "width": 32, "negative_prompt": ""},
        ... )
        >>> estimate.prompts, estimate.offload
        (1, False)
    """
    asked = Options(**options)
    arguments = _arguments(call_kwargs, asked)
    count = auto_count(groups)
    chosen = {
        name: split_groups(_block_counts(pipe, name, groups), groups if count is None else count)
        for name in _names(pipe, component)
    }
    session = Session(pipe, chosen, asked, arguments)
    return session.estimate(batches(prompts, asked.seed, asked.batch_size, arguments))


def _names(pipe: Any, component: Components | None) -> tuple[str, ...]:
    modules = components_of(pipe)
    if component is None:
        component = next((name for name in _DENOISERS if name in modules), _DENOISERS[0])
    names = (component,) if isinstance(component, str) else tuple(component)
    missing = [name for name in names if name not in modules]
    if missing or not names or len(set(names)) < len(names):
        raise UnsupportedModelError(
            f"component={component!r}: {type(pipe).__name__} has the models "
            f"{', '.join(sorted(modules))}; name one, or several that take turns"
        )
    return names


def _folders(parts: str | os.PathLike[str] | None, names: Sequence[str]) -> dict[str, Parts | None]:
    if parts is None:
        return dict.fromkeys(names)
    if len(names) == 1:
        return {names[0]: Parts(parts)}
    return {name: Parts(Path(parts) / name) for name in names}


def _arguments(call_kwargs: Mapping[str, Any] | None, options: Options) -> dict[str, Any]:
    steps = options.num_inference_steps
    asked = (call_kwargs or {}).get("num_inference_steps", steps)
    if asked != steps:
        raise StatsError(
            f"num_inference_steps={steps}, and call_kwargs asks for {asked} steps: leave it out "
            "of call_kwargs"
        )
    return {**(call_kwargs or {}), "num_inference_steps": steps}


def _block_counts(pipe: Any, component: str, groups: Groups) -> dict[str, int]:
    transformer = getattr(pipe, component)
    lists = adapter_for(transformer, required=groups not in (None, 0, "0")).block_lists
    return {b.name: len(blocks_of(transformer, b)) for b in lists}


def _measure(
    session: Session,
    work: Sequence[Batch],
    folders: Mapping[str, Parts | None],
    progress: bool,
    log: Log,
) -> list[dict[str, CalibrationStats]]:
    """Statistics of these batches; what the folders hold is read, what is measured is added."""
    found: list[dict[str, CalibrationStats]] = []
    todo = []
    for batch in work:
        kept = {
            name: [] if parts is None else parts.load_all(batch.ids, session.identity(name))
            for name, parts in folders.items()
        }
        if all(len(stats) == len(batch.ids) for stats in kept.values()):
            found.append({name: merge_all(stats) for name, stats in kept.items()})
        else:
            todo.append(batch)
    if found:
        count = sum(next(iter(each.values())).num_prompts for each in found)
        log(f"resuming: {count} prompts are in the folder already")
    if not todo:
        return found
    estimate = session.estimate(todo)
    log(str(estimate))
    for each in found:
        for stats in each.values():
            require_same("statistics in the folder", {"sigmas": estimate.sigmas}, stats)
    with _bar(sum(len(batch.ids) for batch in todo), progress) as bar:
        for batch in todo:
            size, done = len(batch.ids), bar.n
            bar.set_postfix_str(_which(batch, work))
            measured = session.measure(batch, functools.partial(_advance, bar, size))
            bar.update(done + size - bar.n)
            for name, parts in folders.items():
                if parts is not None:
                    parts.save(measured[name])
            found.append(measured)
    return found


def _advance(bar: tqdm, size: int, share: float) -> None:
    bar.update(share * size)


def _bar(prompts: int, progress: bool) -> tqdm:
    """A bar over prompts, and shares of them; for people who watch, not for log files."""
    shown = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]"
    off = None if progress else True
    return tqdm(total=prompts, desc="calibrate", bar_format=shown, disable=off)


def _which(batch: Batch, work: Sequence[Batch]) -> str:
    """Where a batch stands among the prompts of this process, those of an earlier run too."""
    names = [name for each in work for name in each.ids]
    first = names.index(batch.ids[0]) + 1
    last = first + len(batch.ids) - 1
    which = f"prompt {first}" if first == last else f"prompts {first}-{last}"
    return f"{which} of {len(names)}"


def _chosen_groups(
    pipe: Any,
    component: str,
    prompts: Sequence[Prompt],
    groups: Groups,
    options: Options,
    arguments: Mapping[str, Any],
    parts: Parts | None,
    processes: Processes,
    log: Log,
) -> tuple[Group, ...]:
    count = auto_count(groups)
    counts = _block_counts(pipe, component, groups)
    if groups is None and calls_twice(pipe.scheduler):
        log(
            f"{type(pipe.scheduler).__name__} calls the model twice a step: there are no groups of "
            "blocks, and plans skip whole steps"
        )
        return ()
    if not counts:
        log(
            f"no adapter knows {type(getattr(pipe, component)).__name__}: there are no groups of "
            "blocks, and plans skip whole steps"
        )
    if count is None:
        return split_groups(counts, groups)
    chosen: tuple[Group, ...] | None = None
    if is_main_process():
        kept = None
        if parts is not None:
            equal = {component: split_groups(counts, count)}
            known = Session(pipe, equal, options, arguments).identity(component)
            same = {name: known[name] for name in known.keys() - {"groups", "sketch_size"}}
            kept = parts.found_groups(count, same)
        if kept is None:
            chosen = find_groups(pipe, component, prompts, count, options, arguments, log)
        else:
            chosen = split_groups(counts, kept)
        log(f"groups: {','.join(group.name for group in chosen)}")
    agreed = processes.agree(chosen)
    if agreed is None:
        raise StatsError("the main process found no groups; see its error")
    return agreed


def find_groups(
    pipe: Any,
    component: str,
    prompts: Sequence[Prompt],
    count: int,
    options: Options,
    arguments: Mapping[str, Any],
    log: Log = _log,
) -> tuple[Group, ...]:
    """`count` groups, from a pass in residual mode with one group a block on a few prompts."""
    counts = _block_counts(pipe, component, count)
    # Out of range is an error before anything runs.
    split_groups(counts, count)
    quick = replace(options, lags=1, mode="residual", probes=None)
    session = Session(pipe, {component: split_groups(counts, "blocks")}, quick, arguments)
    work = batches(prompts[:_AUTO_PROMPTS], options.seed, options.batch_size, arguments)
    log("finding groups of similar blocks")
    found = _measure(session, work, {component: None}, False, log)
    return alike_groups(merge_all([each[component] for each in found]), count)
