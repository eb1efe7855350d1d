"""One model behind a service, at several qualities: every request says which plan it takes.

    python examples/serve_qualities.py MODEL layercache_plans.json --prompt "a lighthouse at dusk"

MODEL is a folder or an id of the hub, and the file a set of plans (`layercache bundle`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

from layercache import PlanSet
from layercache.runtime import apply_plan

QUALITIES = {"full": None, "fine": "1.37x", "fast": "2x"}
"""What a request may ask for, and the budget that it means."""


class Service:
    """One pipeline; a plan is on it only while a request that asked for it runs."""

    def __init__(self, model: str, plans: PlanSet, device: str) -> None:
        self.pipe = DiffusionPipeline.from_pretrained(model, dtype="auto").to(device)
        self.plans = {name: plans.at(budget) for name, budget in QUALITIES.items() if budget}

    def answer(self, quality: str, prompt: str, seed: int, **call: Any) -> Any:
        """An image. Requests of one service run one after another."""
        call |= {"prompt": prompt, "generator": torch.Generator().manual_seed(seed)}
        if quality not in self.plans:
            return self.pipe(**call).images[0]
        with apply_plan(self.pipe, self.plans[quality]):
            return self.pipe(**call).images[0]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Answer one request in every quality; returns the images by quality."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("plans")
    parser.add_argument("--prompt", default="a lighthouse at dusk")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    plans = PlanSet.load(options.plans)
    service, first = Service(options.model, plans, options.device), plans.plans[0]
    # The call that the plans are for: size, guidance and so on.
    call = {**first.setting.get("call", {}), "num_inference_steps": first.num_steps}
    images = {name: service.answer(name, options.prompt, seed=0, **call) for name in QUALITIES}
    for name, image in images.items():
        image.save(f"{name}.png")
    return images


if __name__ == "__main__":
    main()
