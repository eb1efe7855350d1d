"""`calibrate_function`: calibration of a model that is a function, for loops of one's own.

The loop is Euler's, and ours. A function has no blocks to be grouped, so what comes out makes plans
of whole steps.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from layercache.calibration._kept import Kept
from layercache.calibration._options import Options
from layercache.calibration._parts import LATENT_SHAPE
from layercache.calibration._propagation import PROBES, growth_table
from layercache.calibration._record import Run
from layercache.calibration._sketch import CountSketch
from layercache.calibration._timing import StepTimes
from layercache.errors import StatsError
from layercache.models.clock import Clock
from layercache.stats import CalibrationStats, merge_all

Velocity = Callable[[Any, float, Any], Any]
_TOLERANCE = 1e-2
"""Kernels may sum in another order from one call to the next."""


def calibrate_function(
    velocity: Velocity,
    sigmas: Sequence[float],
    noises: Sequence[Any],
    conditions: Sequence[Any] | None = None,
    *,
    name: str | None = None,
    probes: int = PROBES,
    sketch_size: int = 1024,
    seed: int = 0,
    progress: bool = False,
) -> CalibrationStats:
    """Measure a flow-matching model that is a function, for plans of whole steps.

    Each of P noises is carried through all T steps of Euler's method,

        z_{t+1} = z_t + (sigma_{t+1} - sigma_t) velocity(z_t, sigma_t, condition),

    and then again, changed at a few steps, to see how errors grow. A model whose time s runs up
    from noise at 0 to data at 1 has sigma = 1 - s and the opposite sign:
    `lambda z, sigma, condition: -model(z, 1 - sigma, condition)`.

    Without a decoder the PSNR of a plan is that of the final latent, the peak being the distance of
    its largest value from its smallest.

    Args:
        velocity: dz/dsigma as the sampler needs it, guidance included: (latent, sigma, condition)
            to an array of the latent's shape. It must give the same for the same arguments.
        sigmas: T+1 noise levels, strictly falling to 0.
        noises: P starting latents of one shape, tensors or arrays; a batch axis of one's own is
            part of that shape.
        conditions: P values that `velocity` gets with the noises; None if there are none.
        name: What plans call the model; the function's own name if None.
        probes: Perturbed runs a noise, which measure how errors grow: each costs about two
            thirds of a generation. Without any, errors count as if none grew.
        sketch_size: Numbers that are kept of a velocity.
        seed: Of the sketches.
        progress: Show a progress bar on stderr.

    Returns:
        Statistics of the P generations, with no groups.

    Raises:
        StatsError: The arguments make no sense or do not fit one another, `velocity` gives another
            shape than it gets or not the same twice, or something overflowed.

    Example:
        >>> stats = calibrate_function(
        ...     lambda z, sigma, condition: np.sin(3 * z) + condition,
        ...     np.linspace(1, 0, 9), np.random.default_rng(0).normal(size=(2, 5)), [0.1, 0.2],
        ... )
        >>> stats.velocities.shape, stats.num_groups
        ((2, 8, 5), 0)
    """
    levels = _levels(sigmas)
    asked = Options(
        num_inference_steps=len(levels) - 1, probes=probes, sketch_size=sketch_size, seed=seed
    )
    pairs = _pairs(noises, conditions)
    called = str(name or getattr(velocity, "__qualname__", type(velocity).__name__))
    found: dict[str, CalibrationStats] = {}
    with torch.no_grad():
        for noise, condition in tqdm(pairs, desc="calibrate", disable=not progress):
            stats = _Generation(velocity, levels, noise, condition).measure(asked, called)
            if stats.prompt_ids[0] in found:
                raise StatsError(
                    f"noise {len(found)} and its condition stand among those before it: give "
                    "each pair once"
                )
            found[stats.prompt_ids[0]] = stats
    return merge_all(list(found.values()))


def _levels(sigmas: Sequence[float]) -> tuple[float, ...]:
    levels = tuple(float(sigma) for sigma in sigmas)
    falling = all(a > b for a, b in itertools.pairwise(levels))
    if len(levels) < 2 or not falling or levels[-1] != 0:
        raise StatsError(
            f"sigmas is {str(list(levels))[:80]}; it must hold T+1 >= 2 levels that fall strictly "
            "to 0 (a model whose time runs up from 0 to 1 has sigma = 1 - time)"
        )
    return levels


def _pairs(noises: Sequence[Any], conditions: Sequence[Any] | None) -> list[tuple[Any, Any]]:
    count = len(noises)
    given = [None] * count if conditions is None else list(conditions)
    if not count or len(given) != count:
        raise StatsError(f"{count} noises and {len(given)} conditions: give as many, at least 1")
    shapes = {tuple(np.shape(noise)) for noise in noises}
    if len(shapes) > 1:
        raise StatsError(
            f"noises have the shapes {sorted(shapes)}; statistics are of one shape: calibrate "
            "each by itself, or pad them"
        )
    return list(zip(noises, given, strict=True))


class _Generation:
    """One noise carried to its end, recorded."""

    def __init__(
        self, velocity: Velocity, sigmas: tuple[float, ...], noise: Any, condition: Any
    ) -> None:
        self.velocity, self.condition, self.noise = velocity, condition, noise
        self.sigmas = sigmas
        self.steps = len(sigmas) - 1
        self.run = Run(Kept(0), sigmas=sigmas)
        device = noise.device if isinstance(noise, Tensor) else torch.device("cpu")
        self.times = StepTimes(Clock(device), 0)

    def measure(self, asked: Options, name: str) -> CalibrationStats:
        """Its statistics."""
        run = self.run
        self._record()
        self._check_repeats()
        sketch = CountSketch(run.final.numel(), asked.sketch_size, asked.seed)
        span = float(run.final.max() - run.final.min())
        return CalibrationStats(
            sigmas=np.array(self.sigmas),
            groups=(),
            branches=1,
            velocities=_stacked(sketch, run.velocities),
            latents=_stacked(sketch, run.latents),
            deltas=np.zeros((1, self.steps, 0, 1, sketch.size), dtype=np.float32),
            times_ms=self.times.median_ms(np.ones((self.steps, 1)))[None],
            image_gain=np.array([1 / max(span, 1e-6) ** 2]),
            amplification=growth_table(run, asked.perturbed_runs, self._perturbed),
            group_bytes=(),
            velocity_bytes=run.velocities[0].nbytes,
            # The executor keeps velocities alone.
            output_bytes=0,
            numel=sketch.numel,
            sketch_seed=asked.seed,
            prompt_ids=(self._identity(),),
            model={"class_name": name, "block_lists": {}, "architecture": ""},
            setting={
                "scheduler": "Euler",
                "dtype": str(run.latents[0].dtype).removeprefix("torch."),
                "num_inference_steps": self.steps,
                LATENT_SHAPE: list(run.final.shape[1:]),
            },
            component="function",
            probes=asked.perturbed_runs,
        )

    def _record(self) -> None:
        clock, latent, run = self.times.clock, self.noise, self.run
        run.latents.append(_copied(latent))
        for step in range(self.steps):
            begin = clock.mark()
            made = self.velocity(latent, self.sigmas[step], self.condition)
            end = clock.mark()
            latent = self._moved(step, latent, made)
            self.times.call(begin, end)
            self.times.outside(begin, clock.mark())
            self.times.end_step()
            run.velocities.append(_copied(made))
            run.latents.append(_copied(latent))

    def _moved(self, step: int, latent: Any, made: Any) -> Any:
        if np.shape(made) != np.shape(latent):
            raise StatsError(
                f"velocity gives an array of shape {tuple(np.shape(made))} for a latent of shape "
                f"{tuple(np.shape(latent))}; it must give one value for each of the latent's"
            )
        return latent + (self.sigmas[step + 1] - self.sigmas[step]) * made

    def _check_repeats(self) -> None:
        step = min(1, self.steps - 1)
        latent = self._like(self.run.latents[step])
        again = _copied(self.velocity(latent, self.sigmas[step], self.condition))
        then = self.run.velocities[step]
        if not (again - then).float().norm() <= _TOLERANCE * then.float().norm():
            raise StatsError(
                f"velocity gives something else when it is called a second time with the latent of "
                f"step {step}: it draws noise, keeps state between its calls, or overflows, so "
                "single steps cannot be judged"
            )

    def _perturbed(self, probe: int, change: Tensor) -> Tensor:
        """(1, ...) final latent of a run that is moved by `change` after step `probe`."""
        latent = self._like(self.run.latents[probe + 1] + change.to(self.run.final))
        for step in range(probe + 1, self.steps):
            made = self.velocity(latent, self.sigmas[step], self.condition)
            latent = self._moved(step, latent, made)
        return _copied(latent)

    def _like(self, recorded: Tensor) -> Any:
        """A recorded latent as the function got it."""
        if isinstance(self.noise, Tensor):
            return recorded[0].to(self.noise.device)
        return recorded[0].numpy()

    def _identity(self) -> str:
        """Of the noise and, by what it makes the first velocity, of the condition."""
        digest = hashlib.sha256()
        for tensor in (self.run.latents[0], self.run.velocities[0]):
            digest.update(tensor.double().numpy().tobytes())
        return digest.hexdigest()


def _copied(value: Any) -> Tensor:
    """(1, ...) on the CPU."""
    tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(np.array(value))
    return tensor.to("cpu", copy=True)[None]


def _stacked(sketch: CountSketch, rows: Sequence[Tensor]) -> NDArray[np.float32]:
    """(1, rows, S)."""
    return torch.stack([sketch(row.float()) for row in rows], dim=1).numpy()
