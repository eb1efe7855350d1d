"""`apply_plan`: everything is checked first, then everything is put on, or nothing is."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from layercache.errors import LayerCacheError, PlanError, UnsupportedModelError
from layercache.models.adapters import adapter_for, check_signature, unwrap
from layercache.models.fingerprint import model_fingerprint, setting_of
from layercache.models.gates import gate_of, is_compiled
from layercache.plan import Plan
from layercache.plan_set import PlanSet
from layercache.runtime._run import PlanRun
from layercache.runtime._session import OnMismatch
from layercache.runtime._units import placed


def apply_plan(
    pipe: Any,
    plan: Plan | PlanSet,
    *,
    component: str | None = None,
    on_mismatch: OnMismatch = "error",
) -> PlanRun:
    """Put a plan on a pipeline.

    The pipeline is called as before. At every step the units that the plan computes run as they
    are, the others are predicted from what was computed before: a group of blocks adds
    `r_a + sum_h b_h (r_a - r_{a_h})` to its input for every stream, and from a computed step to the
    next the latent makes one move, by `m_a = u_a + sum_h b_h (u_a - u_{a_h})`. A plan that computes
    every cell, without taps, gives bit-identical images.

    Args:
        pipe: A diffusers pipeline whose scheduler has `sigmas`. Plans that cache groups need a
            transformer with an adapter, plans of whole steps do not.
        plan: A `Plan` for this transformer, or a `PlanSet`: each run then takes the plan for its
            noise levels, of several the one whose setting differs least, then the first; the report
            says which.
        component: Which attribute of the pipeline the plan is for, if not the plan's own
            `component`. A pipeline with two experts takes one plan each.
        on_mismatch: What to do with a run whose noise levels are not the plan's (tolerance
            1e-4): `"error"` raises, `"compute"` computes the run in full, with one warning.

    Returns:
        The run: a context manager that takes the plan off, with `remove()` and `report()`.

    Raises:
        ModelMismatchError: The plan is for another model; or, while the pipeline runs, for another
            noise schedule.
        UnsupportedModelError: The plan has groups, and no adapter knows the transformer or it is
            compiled as a whole; or, in the first run, its traced forward contradicts the adapter.
            The plan is off then.
        LayerCacheError: A plan is on this transformer already, or a cache of diffusers is.

    Example:
        >>> from layercache import Plan
        >>> from layercache.reference import call_arguments, load_pipeline
        >>> pipe = load_pipeline()  # doctest: +SKIP
        >>> with apply_plan(pipe, Plan.load("plan.json")) as run:  # doctest: +SKIP
        ...     image = pipe("a large red circle", **call_arguments()).images[0]
        >>> print(run.report())  # doctest: +SKIP
    """
    if not isinstance(plan, Plan | PlanSet):
        raise PlanError(
            f"apply_plan takes a Plan or a PlanSet, not a {type(plan).__name__}: "
            "read a file with Plan.load(path)"
        )
    if on_mismatch not in ("error", "compute"):
        raise LayerCacheError(f'on_mismatch={on_mismatch!r}; it is "error" or "compute"')
    plans = _plans(plan, component)
    component = plans[0].component if component is None else component
    transformer = _transformer(pipe, component)
    groups = any(each.groups for each in plans)
    adapter = adapter_for(transformer, required=groups)
    fingerprint, setting = model_fingerprint(transformer), setting_of(pipe, component=component)
    # Of a set, what a run has otherwise than its own plan is said when it is made.
    found = [each.check(fingerprint, setting) for each in plans]
    differences = found[0] if len(plans) == 1 else []
    for each in plans:
        for group, block_list, blocks in placed(each, transformer, adapter):
            for position in group.positions:
                check_signature(block_list, blocks[position])
    if groups and is_compiled(transformer):
        raise UnsupportedModelError(
            f"this {type(transformer).__name__} is compiled as a whole, so its blocks cannot be "
            "skipped one by one: compile the blocks instead, with "
            "layercache.runtime.compile_blocks(transformer)"
        )
    if differences:
        warnings.warn(
            "LayerCache: the plan was made in another setting; its predicted quality may not "
            "hold: " + "; ".join(differences),
            stacklevel=2,
        )
    run = PlanRun(pipe, component, plans, adapter, on_mismatch)
    run.new(differences)
    run.install()
    return run


def _transformer(pipe: Any, component: str) -> nn.Module:
    """The model that a plan is put on, with nothing else on it and a scheduler that can be read."""
    transformer = getattr(pipe, component, None)
    if not isinstance(transformer, nn.Module):
        raise UnsupportedModelError(
            f"{type(pipe).__name__} has no module {component!r}: pass component= with the name of "
            "the pipeline's transformer"
        )
    scheduler = getattr(pipe, "scheduler", None)
    # A list of sigmas could not be compared with the plan's.
    if not hasattr(getattr(scheduler, "sigmas", None), "tolist") or not hasattr(scheduler, "step"):
        raise UnsupportedModelError(
            f"the scheduler of {type(pipe).__name__} has no sigmas (one tensor) or no step: "
            "LayerCache runs flow-matching schedulers, such as FlowMatchEulerDiscreteScheduler"
        )
    if gate_of(transformer) is not None:
        raise LayerCacheError(
            f"a plan is on this {type(transformer).__name__} already: remove that one first "
            "(handle.remove(), or leave its with block)"
        )
    if getattr(unwrap(transformer), "is_cache_enabled", False):
        raise LayerCacheError(
            f"another cache of diffusers is on this {type(transformer).__name__}: call "
            "transformer.disable_cache() first"
        )
    return transformer


def _plans(plan: Plan | PlanSet, component: str | None) -> tuple[Plan, ...]:
    if isinstance(plan, Plan):
        return (plan,)
    named = component or plan.plans[0].component
    mine = tuple(each for each in plan.plans if each.component == named)
    if not mine:
        raise PlanError(
            f"the set has no plan for {named!r}; it has some for "
            f"{sorted({each.component for each in plan.plans})}"
        )
    return mine
