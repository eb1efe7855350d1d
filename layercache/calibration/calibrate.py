"""`calibrate`: the entry point of calibration."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from layercache.calibration.estimate import CalibrationEstimate
from layercache.calibration.grouping import Groups, auto_count, split_groups
from layercache.calibration.parts import Parts, require_same
from layercache.calibration.prompts import Batch, Prompt, batches
from layercache.calibration.replay import device_of
from layercache.calibration.segmentation import alike_groups
from layercache.calibration.session import Log, Options, Session
from layercache.calibration.sharding import Processes, Shard, is_main_process, take_shard
from layercache.errors import StatsError
from layercache.models.adapters import adapter_for, blocks_of
from layercache.stats import CalibrationStats, Group, merge_all

_log: Log = logging.getLogger(__name__).info
_AUTO_PROMPTS = 2


def calibrate(
    pipe: Any,
    prompts: Sequence[Prompt],
    *,
    num_inference_steps: int = 50,
    groups: Groups = 4,
    lags: int = 8,
    seed: int = 0,
    batch_size: int = 1,
    sketch_size: int = 1024,
    mode: str = "replay",
    probes: int | None = None,
    max_memory: int | None = None,
    shard: Shard | None = None,
    parts: str | os.PathLike[str] | None = None,
    call_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
    log: Log = _log,
) -> CalibrationStats:
    """Measure, per prompt, what `compile_plan` needs; once for every later budget and solver.

    For each prompt the pipeline runs at full compute. At step t, group g is also replaced by the
    residual it had at step t - lag, for lag = 1..M, while earlier groups return what they returned
    and later ones compute; the change of the guided output is the velocity delta D[t, g, lag].
    Velocities and deltas are kept as sketches (`CountSketch`).

    In a process that `torchrun` or `accelerate launch` started, the prompts are split over the
    processes, and every process returns the statistics of all.

    Args:
        pipe: A diffusers pipeline whose `transformer` has an adapter.
        prompts: Strings, or mappings of pipeline arguments (for pipelines without a text encoder).
            Four are enough for a useful plan.
        num_inference_steps: T, as the plan will be served.
        groups: How many groups of blocks, or the groups, or None for one a block; or text: a
            number, `"blocks"`, ranges such as `"0:4,4:28,28:32"`, or `"auto"` or `"auto:N"` for
            groups of neighbouring blocks with similar deltas, found on the first two prompts.
        lags: M, the longest lag measured. Time grows by about G M / 2 forwards a step, less where
            groups are few.
        seed: With the prompt, it seeds the starting noise; it seeds the sketches too.
        batch_size: Prompts a pipeline call (strings only).
        sketch_size: S; the relative error of an inner product is about sqrt(2 / S).
        mode: `"replay"` measures velocity deltas. `"residual"` takes about one generation of time
            and lets the scaled differences of residuals stand in for them.
        probes: Perturbed runs a batch, which measure how errors grow; six in replay mode and none
            in residual mode if None.
        max_memory: Bytes that the run may use above the model on its device. Lags are replayed in
            smaller batches, and residuals kept on the CPU, where that is needed. None is 90 % of
            what is free on a GPU, and 4 GiB elsewhere.
        shard: (i, n) measures only the i-th of n parts of the prompts, for job arrays.
        parts: A folder that gets one file a prompt as soon as it is measured. Prompts whose files
            are there already are not measured again.
        call_kwargs: More pipeline arguments, such as guidance and resolution, as served. Noise
            follows from `seed` and prompt, so a `generator` among them is not used.
        progress: Show a progress bar on stderr.
        log: Gets the estimate of time and memory before the run starts.

    Returns:
        Statistics of the prompts, in the order of their identities.

    Raises:
        UnsupportedModelError: The transformer has no adapter.
        StatsError: The prompts, groups or lags make no sense, the pipeline cannot be replayed, the
            memory does not suffice, or the run overflowed.
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
    options = Options(
        num_inference_steps=num_inference_steps,
        lags=lags,
        seed=seed,
        batch_size=batch_size,
        sketch_size=sketch_size,
        mode=mode,
        probes=probes,
        max_memory=max_memory,
    )
    arguments = _arguments(call_kwargs, options)
    work = batches(prompts, seed, batch_size, arguments)
    folder = None if parts is None else Parts(parts)
    processes = Processes(on_cpu=device_of(pipe.transformer).type == "cpu")
    progress = progress and is_main_process()
    chosen = _chosen_groups(pipe, prompts, groups, options, arguments, folder, processes, log)
    session = Session(pipe, chosen, options, arguments)
    mine = processes.split(take_shard(work, shard))
    found = _measure(session, mine, folder, progress, log)
    return merge_all(processes.gather(found))


def estimate_calibration(
    pipe: Any,
    prompts: Sequence[Prompt],
    *,
    num_inference_steps: int = 50,
    groups: Groups = 4,
    lags: int = 8,
    seed: int = 0,
    batch_size: int = 1,
    sketch_size: int = 1024,
    mode: str = "replay",
    probes: int | None = None,
    max_memory: int | None = None,
    call_kwargs: Mapping[str, Any] | None = None,
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
    options = Options(
        num_inference_steps=num_inference_steps,
        lags=lags,
        seed=seed,
        batch_size=batch_size,
        sketch_size=sketch_size,
        mode=mode,
        probes=probes,
        max_memory=max_memory,
    )
    arguments = _arguments(call_kwargs, options)
    count = auto_count(groups)
    chosen = split_groups(_block_counts(pipe), groups if count is None else count)
    session = Session(pipe, chosen, options, arguments)
    return session.estimate(batches(prompts, seed, batch_size, arguments))


def _arguments(call_kwargs: Mapping[str, Any] | None, options: Options) -> dict[str, Any]:
    steps = options.num_inference_steps
    asked = (call_kwargs or {}).get("num_inference_steps", steps)
    if asked != steps:
        raise StatsError(
            f"num_inference_steps={steps}, and call_kwargs asks for {asked} steps: leave it out "
            "of call_kwargs"
        )
    return {**(call_kwargs or {}), "num_inference_steps": steps}


def _block_counts(pipe: Any) -> dict[str, int]:
    lists = adapter_for(pipe.transformer).block_lists
    return {b.name: len(blocks_of(pipe.transformer, b)) for b in lists}


def _measure(
    session: Session, work: Sequence[Batch], parts: Parts | None, progress: bool, log: Log
) -> list[CalibrationStats]:
    """Statistics of these batches; what `parts` holds is read, what is measured is added to it."""
    found: list[CalibrationStats] = []
    todo = []
    for batch in work:
        kept = [] if parts is None else parts.load_all(batch.ids, session.identity)
        if len(kept) == len(batch.ids):
            found += kept
        else:
            todo.append(batch)
    if found and parts is not None:
        log(f"resuming: {len(found)} prompts are in {parts.folder} already")
    if not todo:
        return found
    estimate = session.estimate(todo)
    log(str(estimate))
    for stats in found:
        require_same("statistics in the folder", {"sigmas": estimate.sigmas}, stats)
    total = sum(len(batch.ids) for batch in todo)
    steps = session.options.num_inference_steps
    with tqdm(total=total * steps, unit="step", desc="calibrate", disable=not progress) as bar:
        done = 0
        for batch in todo:
            bar.set_postfix_str(f"prompt {min(done + 1, total)}/{total}")
            stats = session.measure(batch, functools.partial(bar.update, len(batch.ids)))
            if parts is not None:
                parts.save(stats)
            done += len(batch.ids)
            found.append(stats)
    return found


def _chosen_groups(
    pipe: Any,
    prompts: Sequence[Prompt],
    groups: Groups,
    options: Options,
    arguments: Mapping[str, Any],
    parts: Parts | None,
    processes: Processes,
    log: Log,
) -> tuple[Group, ...]:
    count = auto_count(groups)
    if count is None:
        return split_groups(_block_counts(pipe), groups)
    chosen: tuple[Group, ...] | None = None
    if is_main_process():
        kept = None
        if parts is not None:
            equal = split_groups(_block_counts(pipe), count)
            known = Session(pipe, equal, options, arguments).identity
            same = {name: known[name] for name in known.keys() - {"groups", "sketch_size"}}
            kept = parts.found_groups(count, same)
        if kept is None:
            chosen = find_groups(pipe, prompts, count, options, arguments, log)
        else:
            chosen = split_groups(_block_counts(pipe), kept)
        log(f"groups: {','.join(group.name for group in chosen)}")
    agreed = processes.agree(chosen)
    if agreed is None:
        raise StatsError("the main process found no groups; see its error")
    return agreed


def find_groups(
    pipe: Any,
    prompts: Sequence[Prompt],
    count: int,
    options: Options,
    arguments: Mapping[str, Any],
    log: Log = _log,
) -> tuple[Group, ...]:
    """`count` groups, from a pass in residual mode with one group a block on a few prompts."""
    counts = _block_counts(pipe)
    # Out of range is an error before anything runs.
    split_groups(counts, count)
    pass_options = Options(
        num_inference_steps=options.num_inference_steps,
        lags=1,
        seed=options.seed,
        batch_size=options.batch_size,
        sketch_size=options.sketch_size,
        mode="residual",
        max_memory=options.max_memory,
    )
    session = Session(pipe, split_groups(counts, None), pass_options, arguments)
    work = batches(prompts[:_AUTO_PROMPTS], options.seed, options.batch_size, arguments)
    log("finding groups of similar blocks")
    return alike_groups(merge_all(_measure(session, work, None, False, log)), count)
