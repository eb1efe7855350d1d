"""The step unit's stand-in for a model's output, and schedulers of other kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchLCMScheduler, UniPCMultistepScheduler
from torch import Tensor

from layercache.errors import UnsupportedModelError
from layercache.models.stepping import sigmas_of
from layercache.runtime import apply_plan
from tests.models.zoo import build, tensors_of
from tests.runtime.harness import LoopPipeline, SlowRuntime, group, make_plan, step
from tests.runtime.mixed import LIST, MIXED, STEPS, pipeline


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize(
    "name",
    ["QwenImageTransformer2DModel", "LTX2VideoTransformer3DModel", "ZImageTransformer2DModel",
     "WanTransformer3DModel", "Cosmos3OmniTransformer"],
)  # fmt: skip
@torch.no_grad()
def test_a_skipped_call_returns_the_models_own_type(name: str, return_dict: bool) -> None:
    pipe = LoopPipeline(*build(name))
    more = {} if name.startswith("Cosmos3") else {"return_dict": return_dict}

    def call() -> Any:
        return pipe.transformer(**pipe.arguments(0.5, None, "cond"), **more)

    with apply_plan(pipe, make_plan(pipe, 2, [step("#0")])):
        pipe.scheduler.set_timesteps(2)
        computed = call()
        values = [tensor.clone() for tensor in tensors_of(computed)]
        for tensor in tensors_of(computed):
            # Pipelines may write into what they are given.
            tensor.mul_(0.0)
        latent = torch.zeros(1)
        pipe.scheduler.step(latent, pipe.scheduler.timesteps[0], latent)
        answered = call()
        for tensor in tensors_of(answered):
            assert not any(tensor is other for other in tensors_of(computed))
        kept = [tensor.clone() for tensor in tensors_of(answered)]
        for tensor in tensors_of(answered):
            tensor.mul_(0.0)
        again = call()
    assert type(answered) is type(computed) is type(again)
    assert len(values) == len(kept) > 0
    assert all(torch.equal(a, b) for a, b in zip(values, kept, strict=True))


# -- schedulers ------------------------------------------------------------------------------------


class Plain:
    """A scheduler of somebody's own: sigmas and a step, and maybe an index."""

    def __init__(self, indexed: bool, renewed: bool) -> None:
        self.sigmas = torch.tensor([1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0])
        self.timesteps = 1000 * self.sigmas[:-1]
        self.indexed, self.renewed = indexed, renewed
        self.at = 0
        if indexed:
            self._step_index: int | None = None

    def set_timesteps(self, steps: int) -> None:
        assert steps == STEPS
        self.at = 0
        if self.indexed:
            self._step_index = None
        if self.renewed:
            self.sigmas = self.sigmas.clone()

    def set_begin_index(self, index: int) -> None:
        assert index == 0

    def step(self, velocity: Tensor, time: Any, sample: Tensor, return_dict: bool = True) -> Any:
        width = self.sigmas[self.at + 1] - self.sigmas[self.at]
        self.at += 1
        if self.indexed:
            self._step_index = self.at
        return (sample + width * velocity,)


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("renewed", [True, False])
def test_a_scheduler_of_ones_own(indexed: bool, renewed: bool) -> None:
    pipe = pipeline()
    pipe.scheduler = Plain(indexed, renewed)
    expected = SlowRuntime(pipe, STEPS, MIXED).run()
    pipe.scheduler = Plain(indexed, renewed)
    plan = make_plan(pipe, STEPS, MIXED, sigmas=sigmas_of(pipe.scheduler))
    with apply_plan(pipe, plan) as run:
        for count in range(1, 4):
            result = pipe(STEPS)
            assert (result - expected).abs().max() < 1e-5 * expected.abs().max()
            assert run.report().runs == count
            assert run.report().warnings == ()
    assert "step" not in vars(pipe.scheduler)


class Telling(LoopPipeline):
    """A loop that begins late, with a scheduler that has no index and a context that tells it."""

    def call(self, sigma: float, latent: Tensor | None, branch: str) -> Tensor:
        index = self.scheduler.sigmas.tolist().index(sigma)
        self.named = False
        with self.transformer.cache_context(branch, step_index=index):
            return super().call(sigma, latent, branch)


@pytest.mark.parametrize("renewed", [True, False])
def test_a_cache_context_may_tell_the_step(renewed: bool) -> None:
    plan_units = [group(LIST, 0, 4, "##0#0#")]
    pipe = Telling(*build("QwenImageTransformer2DModel"))
    pipe.scheduler = Plain(False, renewed)
    pipe.scheduler.set_begin_index = lambda index: setattr(pipe.scheduler, "at", index)
    plan = make_plan(pipe, STEPS, plan_units, sigmas=sigmas_of(pipe.scheduler))
    with apply_plan(pipe, plan) as run:
        whole = pipe(STEPS)
        assert run.report().warnings == ()
        with pytest.warns(UserWarning, match="differed"):
            pipe(STEPS, start=3)
        # Steps 3, 4 and 5, of which step 4 is predicted from step 3.
        assert run.report().steps_seen == 3
        assert run.report().units[0].seen_predicted == {"cond": 1, "uncond": 1}
        assert torch.equal(pipe(STEPS), whole)


class Batched(LoopPipeline):
    """Latents with a batch and a channel axis, which UniPC counts on."""

    def call(self, sigma: float, latent: Tensor | None, branch: str) -> Tensor:
        return super().call(sigma, latent, branch)[None, None]


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda: UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        lambda: FlowMatchLCMScheduler(shift=3.0),
    ],
    ids=["UniPC", "LCM"],
)
def test_other_schedulers_of_diffusers(scheduler: Any) -> None:
    pipe = Batched(*build("QwenImageTransformer2DModel"))
    pipe.scheduler = scheduler()
    torch.manual_seed(0)
    uncached = pipe(STEPS)
    sigmas = sigmas_of(pipe.scheduler)
    everything = [step("#" * STEPS), group(LIST, 0, 4, "#" * STEPS)]
    with apply_plan(pipe, make_plan(pipe, STEPS, everything, sigmas=sigmas)):
        torch.manual_seed(0)
        assert torch.equal(pipe(STEPS), uncached)
    with apply_plan(pipe, make_plan(pipe, STEPS, MIXED, sigmas=sigmas)) as run:
        torch.manual_seed(0)
        first = pipe(STEPS)
        torch.manual_seed(0)
        assert torch.equal(pipe(STEPS), first)
        assert run.report().warnings == ()
    assert not torch.equal(first, uncached)


def test_a_scheduler_without_sigmas_is_refused() -> None:
    pipe = pipeline()
    plan = make_plan(pipe, STEPS, MIXED)
    pipe.scheduler = object()
    with pytest.raises(UnsupportedModelError, match="has no sigmas"):
        apply_plan(pipe, plan)
