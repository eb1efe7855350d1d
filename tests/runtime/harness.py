"""A pipeline around any transformer, random plans, and a slow runtime to compare with.

The slow runtime shares no code with `layercache.runtime` but the adapters' reading of arguments: it
patches `forward`, keeps every block's own delta of every step for ever, and reads the plan's cells
by itself.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from tqdm import tqdm

from layercache.models import adapter_for, model_fingerprint
from layercache.models.adapters import blocks_of, read_outputs, read_streams, write_outputs
from layercache.models.stepping import sigmas_of
from layercache.options import Options
from layercache.plan import (
    SPANS,
    Budget,
    Certificate,
    ModelFingerprint,
    Plan,
    Predicted,
    UnitPlan,
)
from tests.models.zoo import tensors_of

MAIN = ("x", "hidden_states", "vision_tokens")
TIMES = ("timestep", "timesteps", "t", "vision_timesteps")
TEXTS = (
    "encoder_hidden_states",
    "cap_feats",
    "encoder_hidden_states_t5",
    "input_ids",
)


class LoopPipeline:
    """The smallest pipeline: a scheduler, a transformer, guidance over two calls a step.

    The latent is one flat vector; it enters the transformer through its mean, so that errors at one
    step reach all later ones.
    """

    def __init__(self, transformer: nn.Module, inputs: Mapping[str, Any], guided: bool = True):
        self.transformer = transformer
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.inputs, self.guided = dict(inputs), guided
        self.named = True

    def arguments(self, sigma: float, latent: Tensor | None, branch: str) -> dict[str, Any]:
        changed = dict(self.inputs)
        for name in MAIN:
            if name in changed:
                mean = 0.0 if latent is None else float(latent.mean())
                changed[name] = _mapped(changed[name], lambda v, m=mean: v * (0.5 + sigma) + m)
        for name in TIMES:
            if name in changed:
                changed[name] = changed[name] * sigma
        for name in TEXTS:
            if name in changed and branch == "uncond":
                changed[name] = _mapped(changed[name], lambda v: v.flip(-1))
        return changed

    def call(self, sigma: float, latent: Tensor | None, branch: str) -> Tensor:
        transformer: Any = self.transformer
        context: Any = nullcontext()
        if self.named and hasattr(transformer, "cache_context"):
            context = transformer.cache_context(branch)
        with context:
            output = transformer(**self.arguments(sigma, latent, branch), return_dict=False)
        return torch.cat([tensor.flatten() for tensor in tensors_of(output)]).float()

    def velocity(self, sigma: float, latent: Tensor | None) -> Tensor:
        cond = self.call(sigma, latent, "cond")
        if not self.guided:
            return cond
        uncond = self.call(sigma, latent, "uncond")
        return uncond + 2.0 * (cond - uncond)

    def progress_bar(self, total: int) -> Any:
        """As diffusers' pipelines have one around their loops."""
        return tqdm(total=total, disable=True)

    @torch.no_grad()
    def __call__(self, steps: int, start: int = 0, leave_at: int | None = None) -> Tensor:
        self.scheduler.set_timesteps(steps)
        self.scheduler.set_begin_index(start)
        sigmas = sigmas_of(self.scheduler)
        latent: Tensor | None = None
        with self.progress_bar(total=steps) as bar:
            for index, t in enumerate(self.scheduler.timesteps[start:], start):
                if index == leave_at and latent is not None:
                    break
                velocity = self.velocity(sigmas[index], latent)
                if latent is None:
                    latent = torch.linspace(-1.0, 2.0, velocity.numel()).reshape(velocity.shape)
                latent = self.scheduler.step(velocity, t, latent, return_dict=False)[0]
                bar.update()
        assert latent is not None
        return latent


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return [function(v) for v in value] if isinstance(value, list) else function(value)


Rows = Sequence[Sequence[float]]


def group(name: str, start: int, stop: int, cells: str, taps: Rows | None = None) -> UnitPlan:
    """A group's row."""
    return UnitPlan(
        kind="group", block_list=name, start=start, stop=stop, cells=cells, taps=_rows(taps)
    )


def step(cells: str, taps: Rows | None = None) -> UnitPlan:
    """The step unit's row."""
    return UnitPlan(kind="step", cells=cells, taps=_rows(taps))


def _rows(taps: Rows | None) -> tuple[tuple[float, ...], ...] | None:
    return None if taps is None else tuple(tuple(row) for row in taps)


def make_plan(pipe: Any, steps: int, units: Sequence[UnitPlan], **changes: Any) -> Plan:
    """A plan for the pipeline's transformer on its scheduler's levels for `steps` steps."""
    if "sigmas" not in changes:
        pipe.scheduler.set_timesteps(steps)
    fields: dict[str, Any] = {
        "generator": "tests",
        "model": ModelFingerprint(**model_fingerprint(pipe.transformer)),
        "setting": {},
        "sigmas": sigmas_of(pipe.scheduler),
        "branches": 2 if getattr(pipe, "guided", True) else 1,
        "units": tuple(units),
        "budget": Budget(fraction=0.5),
        "asked": Options(),
        "predicted": Predicted(speedup=2.0, compute_share=0.5, cache_bytes=0),
        "certificate": Certificate(solver="by hand", value=0.0),
    }
    return Plan(**(fields | changes))


def random_units(
    block_lists: Mapping[str, int], steps: int, rng: random.Random, with_step: bool = True
) -> list[UnitPlan]:
    """A valid plan: any cuts, any cells, any taps, published spans that reach a computed step."""
    units: list[UnitPlan] = []
    runs = [True] * steps
    if with_step:
        cells = "#" + "".join(rng.choice("#0") for _ in range(steps - 1))
        runs = [symbol == "#" for symbol in cells]
        units.append(step(cells, _step_taps(cells, rng) if rng.random() < 0.7 else None))
    for name, count in block_lists.items():
        cuts = sorted(rng.sample(range(count + 1), k=min(count + 1, rng.randint(2, 4))))
        for start, stop in itertools.pairwise(cuts):
            units.append(group(name, start, stop, *_group_row(runs, rng)))
    return units


def _some_taps(most: int, rng: random.Random) -> list[float]:
    """Up to four coefficients, now and then one of 0."""
    count = rng.randint(0, min(most, 4))
    return [rng.choice([0.0, rng.uniform(-0.4, 0.4)]) for _ in range(count)]


def _step_taps(cells: str, rng: random.Random) -> list[list[float]]:
    return [
        _some_taps(cells[:index].count("#"), rng) if symbol == "#" else []
        for index, symbol in enumerate(cells)
    ]


def _group_row(runs: Sequence[bool], rng: random.Random) -> tuple[str, list[list[float]]]:
    cells, rows, done = "", [], []
    for index, run in enumerate(runs):
        row: list[float] = []
        if not run:
            symbol = "."
        elif not done or rng.random() < 0.5:
            symbol = "#"
            done.append(index)
        else:
            row = _some_taps(len(done) - 1, rng)
            read = [h for h, tap in enumerate(row) if tap]
            # Without taps of its own a cell reuses, or is the published predictor.
            base = done[-2 - read[-1]] if read else rng.choice(done)
            symbol = SPANS[done[-1] - base]
            row = row if read else []
        cells += symbol
        rows.append(row)
    return cells, rows


class SlowRuntime:
    """Runs a `LoopPipeline` under units, keeping everything and sharing nothing."""

    def __init__(self, pipe: LoopPipeline, steps: int, units: Sequence[UnitPlan]) -> None:
        self.pipe, self.steps, self.units = pipe, steps, units
        self.sigmas: tuple[float, ...] = ()
        self.deltas: dict[tuple[Any, ...], Tensor] = {}
        self.at = (0, "cond")
        self.entered: set[str] = set()

    @torch.no_grad()
    def run(self) -> Tensor:
        pipe = self.pipe
        model: Any = pipe.transformer
        adapter = adapter_for(model)
        patched = []
        for unit in self.units:
            if unit.kind == "group":
                block_list = adapter.block_list(str(unit.block_list))
                blocks = blocks_of(model, block_list)
                for position in range(unit.start or 0, unit.stop or 0):
                    block = blocks[position]
                    block.forward = self._patch(unit, block_list, block, position, block.forward)
                    patched.append(block)
        try:
            return self._loop()
        finally:
            for block in patched:
                del block.forward

    def _loop(self) -> Tensor:
        pipe = self.pipe
        pipe.scheduler.set_timesteps(self.steps)
        self.sigmas = sigmas_of(pipe.scheduler)
        whole = next((unit for unit in self.units if unit.kind == "step"), None)
        velocities: dict[int, Tensor] = {}
        latent: Tensor | None = None
        for index in range(self.steps):
            symbol = "#" if whole is None else whole.cells[index]
            sigma = self.sigmas[index]
            if symbol == "#":
                velocities[index] = used = self._velocity(index, sigma, latent)
                if whole is not None and whole.taps is not None:
                    earlier = sorted((s for s in velocities if s < index), reverse=True)
                    for source, tap in zip(earlier, whole.taps[index], strict=False):
                        used = used + tap * (velocities[index] - velocities[source])
                handed_on = used
            else:
                used = handed_on
            if latent is None:
                latent = torch.linspace(-1.0, 2.0, used.numel())
            latent = latent + (self.sigmas[index + 1] - sigma) * used
        assert latent is not None
        return latent

    def _velocity(self, index: int, sigma: float, latent: Tensor | None) -> Tensor:
        outputs = []
        for branch in ("cond", "uncond") if self.pipe.guided else ("cond",):
            self.at, self.entered = (index, branch), set()
            outputs.append(self.pipe.call(sigma, latent, branch))
        if len(outputs) == 1:
            return outputs[0]
        return outputs[1] + 2.0 * (outputs[0] - outputs[1])

    def _predict(self, unit: UnitPlan, index: int, values: Mapping[int, Tensor]) -> Tensor:
        done = [s for s in range(index) if unit.cells[s] == "#"]
        anchor, span = done[-1], int(unit.cells[index], 36)
        taps = () if unit.taps is None else unit.taps[index]
        result = values[anchor]
        for source, tap in zip(done[-2::-1], taps, strict=False):
            result = result + tap * (values[anchor] - values[source])
        if not taps and span:
            base = anchor - span
            slope = (values[anchor] - values[base]) / (self.sigmas[anchor] - self.sigmas[base])
            result = values[anchor] + (self.sigmas[index] - self.sigmas[anchor]) * slope
        return result

    def _patch(
        self, unit: UnitPlan, block_list: Any, block: nn.Module, position: int, original: Any
    ) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            index, branch = self.at
            before = read_streams(block_list, block, args, kwargs)
            if unit.cells[index] == "#":
                output = original(*args, **kwargs)
                for name, after in read_outputs(block_list, output).items():
                    self.deltas[branch, position, unit.name, name, index] = after - before[name]
                return output
            if unit.name in self.entered:
                return write_outputs(block_list, before)
            self.entered.add(unit.name)
            after = {}
            for name, tensor in before.items():
                sums: dict[int, Tensor] = {}
                for s in range(index):
                    if unit.cells[s] == "#":
                        keys = [
                            (branch, p, unit.name, name, s)
                            for p in range(unit.start or 0, unit.stop or 0)
                        ]
                        # A stream that some block of the group drops is not read afterwards.
                        if all(key in self.deltas for key in keys):
                            sums[s] = sum(self.deltas[key] for key in keys)  # type: ignore[assignment]
                after[name] = tensor + self._predict(unit, index, sums) if sums else tensor
            return write_outputs(block_list, after)

        return forward


def traces(module: nn.Module) -> dict[str, dict[str, int]]:
    """Identity of everything that every submodule carries in its instance dictionary."""
    return {
        name: {
            key: id(value)
            for key, value in vars(child).items()
            if not isinstance(value, (dict, set, list))
        }
        for name, child in module.named_modules()
    }
