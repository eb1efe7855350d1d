"""Half precision and quantised layers: predictions stay finite and close to those of float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layercache.runtime import apply_plan
from layercache.runtime.arithmetic import add, affine
from tests.models.zoo import build
from tests.runtime.harness import LoopPipeline, group, make_plan, step
from tests.runtime.mixed import LIST, MIXED, STEPS, pipeline


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fifty_steps_of_reuse_stay_finite(dtype: torch.dtype) -> None:
    model, inputs = build("QwenImageTransformer2DModel")
    model.to(dtype)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            inputs[name] = value.to(dtype)
    # Large hidden states, as large models have them.
    model.img_in.weight.data *= 1e3
    pipe = LoopPipeline(model, inputs)
    assert pipe(2).isfinite().all()
    pipe.scheduler.set_timesteps(50)
    first, second, *later = pipe.scheduler.sigmas.tolist()
    taps = [(1.5 * (sigma - second) / (second - first),) for sigma in later[:-1]]
    units = [group(LIST, 0, 4, "##" + "1" * 48, [(), (), *taps])]
    with apply_plan(pipe, make_plan(pipe, 50, units)):
        assert pipe(50).isfinite().all()


def test_half_precision_saturates_and_does_not_overflow() -> None:
    large = torch.tensor([60000.0, -60000.0], dtype=torch.float16)
    end = torch.finfo(torch.float16).max
    saturated = torch.tensor([end, -end], dtype=torch.float16)
    assert torch.equal(affine(large, [-large], [1.5]), saturated)
    assert torch.equal(add(large, large), saturated)
    assert torch.equal(affine(large, [-large, -large], [0.5, 0.5]), saturated)


def test_a_prediction_is_linear_in_the_taps() -> None:
    value = torch.tensor([2.0, -1.0])
    earlier = [torch.tensor([1.0, 3.0]), torch.tensor([-4.0, 0.5]), torch.tensor([0.0, 7.0])]
    assert affine(value, [], []) is value
    for taps in ([-2.0], [0.25], [0.5, -0.7], [3.0, 0.0, -1.5]):
        wanted = value + sum(b * (value - u) for b, u in zip(taps, earlier, strict=False))
        torch.testing.assert_close(affine(value, earlier[: len(taps)], taps), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("cells", "factor"), [("##" + "0" * 48, 5.0), ("####1111" + "##11" * 10 + "##", 3.0)]
)
def test_fifty_steps_in_half_precision_are_close_to_float32(
    dtype: torch.dtype, cells: str, factor: float
) -> None:
    def result(used: torch.dtype, planned: bool) -> Tensor:
        model, inputs = build("QwenImageTransformer2DModel")
        model.to(used)
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                inputs[name] = value.to(used)
        pipe = LoopPipeline(model, inputs)
        if not planned:
            return pipe(50)
        with apply_plan(pipe, make_plan(pipe, 50, [group(LIST, 0, 4, cells)])):
            return pipe(50)

    def distance(a: Tensor, b: Tensor) -> float:
        return ((a - b).norm() / b.norm()).item()

    exact = distance(result(dtype, False), result(torch.float32, False))
    planned = distance(result(dtype, True), result(torch.float32, True))
    # Roundings that are new at every step average out; the one of a reused residual does not.
    assert planned < factor * exact


class Int8Linear(nn.Module):
    """Int8 weights and a scale an output, as weight-only quantisers make them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, values: Tensor) -> Tensor:
        return nn.functional.linear(values, self.weight * self.scale, self.bias)


def weight_only(model: nn.Module) -> nn.Module:
    for name, child in list(model.named_modules()):
        if isinstance(child, nn.Linear):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], Int8Linear(child))
    return model


def dynamic(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("quantise", [weight_only, dynamic])
def test_quantised_layers_run_under_a_plan(quantise: Any) -> None:
    pipe = pipeline()
    with apply_plan(pipe, make_plan(pipe, STEPS, MIXED)):
        full_precision = pipe(STEPS)
    # The plan of the full-precision model serves the quantised one.
    plan = make_plan(pipe, STEPS, MIXED)
    pipe.transformer = quantise(pipe.transformer)
    uncached = pipe(STEPS)
    everything = make_plan(pipe, STEPS, [step("#" * STEPS), group(LIST, 0, 4, "#" * STEPS)])
    with apply_plan(pipe, everything):
        assert torch.equal(pipe(STEPS), uncached)
    with apply_plan(pipe, plan) as run:
        result = pipe(STEPS)
    assert run.report().warnings == ()
    assert not torch.equal(result, full_precision)
    assert (result - full_precision).norm() < 0.1 * full_precision.norm()
    assert torch.equal(pipe(STEPS), uncached)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_means_are_accumulated_in_single_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    value, *others = torch.randn(5, 1000).to(dtype)
    taps = [1.7, -1.1, 0.6, -0.3]
    exact = value.double() * (1 + sum(taps))
    for other, tap in zip(others, taps, strict=True):
        exact -= tap * other.double()
    found = affine(value, others, taps)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-5)
