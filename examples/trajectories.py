"""A plan for a model outside diffusers: paths around an obstacle, as a robot's planner makes them.

Trains a small flow-matching model in some seconds (plain torch, no images), calibrates it as a
function, compiles plans for some numbers of calls, and prints how far each plan's paths end from
those of full sampling, beside fewer steps with as many calls.

    python examples/trajectories.py
    python examples/trajectories.py --steps 30 --calls 15,10 --train-steps 500
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from layercache import compile_plan
from layercache.calibration import calibrate_function
from layercache.runtime import sample

POINTS = 24


def paths(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Paths (count, 2 POINTS) from the left to a goal, and what they depend on (count, 2).

    Goal and obstacle stand at some height; a path passes the obstacle above or below.
    """
    goal, obstacle = torch.rand(2, count, 1, generator=generator) * 2 - 1
    side = (torch.rand(count, 1, generator=generator) < 0.5).float() * 2 - 1
    speed = 0.7 + 0.6 * torch.rand(count, 1, generator=generator)
    time = torch.linspace(0, 1, POINTS)[None] ** speed
    straight = goal * time
    needed = obstacle + 0.4 * side - 0.5 * goal
    bump = torch.exp(-(((time - 0.5) / 0.18) ** 2))
    return torch.cat([2 * time - 1, straight + needed * bump], 1), torch.cat([goal, obstacle], 1)


class Planner(nn.Module):
    """The velocity dz/dsigma of z = (1 - sigma) path + sigma noise, given goal and obstacle."""

    def __init__(self, width: int = 192) -> None:
        super().__init__()
        self.first = nn.Linear(2 * POINTS + 2 + 16, width)
        self.middle = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.last = nn.Linear(width, 2 * POINTS)

    def forward(self, z: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        """(B, 2 POINTS) from latents (B, 2 POINTS), levels (B, 1) and conditions (B, 2)."""
        angles = sigma * 2.0 ** torch.arange(8)
        hidden = self.first(torch.cat([z, condition, angles.sin(), angles.cos()], 1))
        for layer in self.middle:
            hidden = hidden + layer(nn.functional.silu(hidden))
        output: Tensor = self.last(nn.functional.silu(hidden))
        return output


def train(steps: int, seed: int = 0) -> Planner:
    """A planner after some steps of flow matching on batches of 256 paths."""
    torch.manual_seed(seed)
    model, generator = Planner(), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=max(steps, 2))
    for _ in range(steps):
        data, condition = paths(256, generator)
        noise = torch.randn(data.shape, generator=generator)
        sigma = torch.rand(len(data), 1, generator=generator)
        made = model((1 - sigma) * data + sigma * noise, sigma, condition)
        loss = (made - (noise - data)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def euler(model: Planner, noise: Tensor, condition: Tensor, steps: int) -> Tensor:
    """Plain sampling: `steps` calls."""
    sigmas = np.linspace(1, 0, steps + 1).tolist()
    z = noise
    for here, there in itertools.pairwise(sigmas):
        z = z + (there - here) * model(z, torch.full((len(z), 1), here), condition)
    return z


def main(arguments: Sequence[str] | None = None) -> dict[int, tuple[float, float]]:
    """Run the example; returns the median errors of plan and fewer steps by number of calls."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--calls", default="20,13,10")
    parser.add_argument("--train-steps", type=int, default=2000)
    parser.add_argument("--paths", type=int, default=8, help="for calibration")
    options = parser.parse_args(arguments)

    model = train(options.train_steps)

    def velocity(z: Tensor, sigma: float, condition: Tensor) -> Tensor:
        return model(z, torch.full((len(z), 1), sigma), condition)

    generator = torch.Generator().manual_seed(1)
    _, conditions = paths(options.paths, generator)
    noises = torch.randn(options.paths, 1, 2 * POINTS, generator=generator)
    sigmas = np.linspace(1, 0, options.steps + 1).tolist()
    # A batch axis of 1 is part of the latent; sampling may use any batch.
    stats = calibrate_function(velocity, sigmas, noises, list(conditions[:, None]), name="Planner")

    _, conditions = paths(256, generator)
    noises = torch.randn(256, 2 * POINTS, generator=generator)
    wanted = euler(model, noises, conditions, options.steps)
    print("RMS distance to the path of full sampling, 256 new ones: median (mean)")
    found = {}
    for calls in map(int, options.calls.split(",")):
        plan = compile_plan(stats, calls / options.steps)
        made = {
            f"plan, {sum(plan.run_steps)} of {options.steps} steps": sample(
                velocity, noises, plan, conditions
            ),
            f"{calls} steps": euler(model, noises, conditions, calls),
        }
        errors = [(z - wanted).square().mean(1).sqrt() for z in made.values()]
        for label, error in zip(made, errors, strict=True):
            print(f"  {label:<24} {error.median():.5f} ({error.mean():.5f})")
        found[calls] = (float(errors[0].median()), float(errors[1].median()))
    return found


if __name__ == "__main__":
    main()
