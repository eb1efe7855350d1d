"""A plan's step unit, executed on whatever holds velocities: tensors, arrays, numbers. No torch.

At a computed step a the model gives u_a. From there to the next computed step e the latent makes
one move, whatever is skipped in between:

    m_a = u_a + sum_h b_h (u_a - u_{a_h}),      z_e = z_a + (sigma_e - sigma_a) m_a,

a_h the h-th computed step before a and b_h the plan's taps. Which steps are visited, and where the
latent goes, follows from the plan and from velocities alone, so that a pipeline under a plan, a
scheduler, a loop of one's own and a node of another program all do the same.

Example:
    >>> from layercache import Plan
    >>> plan = Plan.load("plan.json")  # doctest: +SKIP
    >>> latent = sample(lambda z, sigma, text: model(z, sigma, text), noise, plan, text)
    ... # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from layercache.errors import PlanError
from layercache.plan import Plan, Schedule

A = TypeVar("A")
Affine = Callable[[A, Sequence[A], Sequence[float]], A]


def affine(value: Any, earlier: Sequence[Any], taps: Sequence[float]) -> Any:
    """`value + sum of tap * (value - other)`."""
    result = value
    for other, tap in zip(earlier, taps, strict=True):
        result = result + tap * (value - other)
    return result


def copied(value: Any) -> Any:
    """A copy of a tensor or an array, which the model may write over; anything else as it is."""
    copy = getattr(value, "clone", None) or getattr(value, "copy", None)
    return value if copy is None else copy()


def sample(
    velocity: Callable[[Any, float, Any], Any], noise: Any, plan: Plan, condition: Any = None
) -> Any:
    """One generation in a loop of one's own, at the plan's computed steps alone.

    Args:
        velocity: As `calibration.calibrate_function` takes it: (latent, sigma, condition) to
            dz/dsigma.
        noise: The starting latent, a tensor or an array.
        plan: A plan of whole steps. Steps before the first skipped one are Euler's.
        condition: What `velocity` gets as its third argument.

    Returns:
        The final latent, at sigma 0.

    Raises:
        PlanError: The plan caches groups.

    Example:
        >>> latent = sample(velocity, noise, Plan.load("plan.json"))  # doctest: +SKIP
    """
    executor: StepExecutor[Any] = StepExecutor.of(plan, keep=copied)
    return executor.run(lambda latent, sigma: velocity(latent, sigma, condition), noise)


class StepExecutor(Generic[A]):
    """What skipped steps are made of, for one run at a time.

    Args:
        schedule: The resolved row of the step unit.
        sigmas: The plan's T+1 noise levels.
        affine: How a mean velocity is computed; `affine` of this module by default.
        keep: Makes a copy that is safe to hold, where velocities may be written into.

    Attributes:
        visited: The computed steps.
        sigmas: As given.
        first_pause: The last computed step before the first skipped one, from which on the plan
            moves the latent; T if no step is skipped.
    """

    def __init__(
        self,
        schedule: Schedule,
        sigmas: Sequence[float],
        affine: Affine[A] = affine,
        keep: Callable[[A], A] = lambda value: value,
    ) -> None:
        self.schedule = schedule
        self.sigmas = tuple(sigmas)
        self.visited = tuple(step for step, here in enumerate(schedule.computed) if here)
        skipped = [step for step, here in enumerate(schedule.cached) if here]
        self.first_pause = skipped[0] - 1 if skipped else len(schedule.computed)
        self._affine, self._keep = affine, keep
        self._values: dict[int, A] = {}
        self._mean: tuple[int, A] | None = None

    @classmethod
    def of(
        cls,
        plan: Plan,
        affine: Affine[A] = affine,
        keep: Callable[[A], A] = lambda value: value,
    ) -> StepExecutor[A]:
        """For a plan of whole steps; every step is computed where it has no step unit.

        Raises:
            PlanError: The plan caches groups.
        """
        cached = {unit.name: sum(plan.schedules[unit.name].cached) for unit in plan.groups}
        caching = {name: count for name, count in cached.items() if count}
        if caching:
            raise PlanError(
                f"the plan caches groups of blocks ({caching}), which only hooks can: run it with "
                'layercache.runtime.apply_plan, or compile one with units=("step",)'
            )
        return cls(plan.step_row.schedule(plan.sigmas), plan.sigmas, affine, keep)

    def compute(self, step: int, velocity: A) -> A | None:
        """The mean velocity m_a of a computed step, given its own; stores what is read later.

        None if an earlier velocity that it reads is not there (a run that started late).
        """
        reads = self.schedule.reads[step]
        mean: A | None = velocity
        if any(source not in self._values for source, _ in reads):
            mean = None
        elif reads:
            earlier = [self._values[source] for source, _ in reads]
            mean = self._affine(velocity, earlier, [tap for _, tap in reads])
        if self.schedule.last_use[step] > step:
            self._values[step] = self._keep(velocity)
        pauses = self.schedule.pauses_at(step)
        self._mean = (step, self._keep(mean)) if pauses and mean is not None else None
        return mean

    def repeated(self, step: int) -> A | None:
        """The mean velocity that a skipped step repeats, or None if it is not there."""
        anchor = self.schedule.anchor[step]
        return self._mean[1] if self._mean is not None and self._mean[0] == anchor else None

    def finish(self, step: int) -> None:
        """Drop what no step after `step` reads."""
        for source in [s for s in self._values if self.schedule.last_use[s] <= step]:
            del self._values[source]
        if not any(self.schedule.cached[step + 1 : step + 2]):
            self._mean = None

    def clear(self) -> None:
        """Drop everything."""
        self._values.clear()
        self._mean = None

    @property
    def held(self) -> list[A]:
        """All that is stored now."""
        return [*self._values.values(), *([] if self._mean is None else [self._mean[1]])]

    def after(self, step: int) -> int:
        """The step that a computed step's move leads to: the next computed one, or T."""
        return next((e for e in self.visited if e > step), len(self.schedule.computed))

    def move(self, latent: A, mean: A, start: int, stop: int) -> A:
        """The latent at `stop`, from that at `start`."""
        moved: Any = latent
        factor: Any = self.sigmas[stop] - self.sigmas[start]
        result: A = moved + factor * mean
        return result

    def run(self, velocity: Callable[[A, float], A], latent: A) -> A:
        """A whole generation: `velocity(latent, sigma)` is called at the computed steps alone."""
        self.clear()
        for step in self.visited:
            mean = self.compute(step, velocity(latent, self.sigmas[step]))
            assert mean is not None
            stop = self.after(step)
            latent = self.move(latent, mean, step, stop)
            self.finish(stop - 1)
        return latent
