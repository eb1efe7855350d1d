"""Calibration on tiny random pipelines, against an oracle that calls the blocks by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from layercache.calibration import calibrate
from layercache.calibration.prompts import noise_seed, prompt_id
from layercache.errors import StatsError, UnsupportedModelError
from layercache.stats import CalibrationStats, Group
from tests.tiny import tiny_arguments, tiny_pipeline

PROMPTS = ["a large red circle", "a small blue square left on a gray background"]
STEPS, LAGS, GROUPS = 5, 3, 2


class MomentumPipeline:
    """A pipeline whose guidance remembers what it gave the step before."""

    def __init__(self) -> None:
        inner = tiny_pipeline()
        self.transformer, self.scheduler, self.vae = inner.transformer, inner.scheduler, None

    def __call__(self, prompt: str, generator: torch.Generator, **_: Any) -> tuple[Tensor]:
        z, momentum = torch.randn(1, 64, 48, generator=generator), torch.zeros(1, 64, 48)
        self.scheduler.set_timesteps(STEPS)
        for t in self.scheduler.timesteps:
            text = torch.ones(1, 3, 64)
            output = self.transformer(z, text, None, t[None] / 1000, [[(1, 8, 8)]])[0]
            momentum = output + 0.5 * momentum
            z = self.scheduler.step(momentum, t, z, return_dict=False)[0]
        return (z,)


def measure(pipe: Any, prompts: Any = PROMPTS, **changes: Any) -> CalibrationStats:
    arguments: dict[str, Any] = {
        "num_inference_steps": STEPS,
        "groups": GROUPS,
        "lags": LAGS,
        "sketch_size": 4096,
        "call_kwargs": tiny_arguments(),
        "progress": False,
    }
    return calibrate(pipe, prompts, **(arguments | changes))


class ByHand:
    """The pipeline's loop for one prompt, its transformer called block by block."""

    def __init__(self, pipe: Any, prompt: str, seed: int = 0) -> None:
        self.pipe, self.model = pipe, pipe.transformer
        self.embeds = [pipe.encode_prompt(text)[0] for text in (prompt, "")]
        generator = torch.Generator().manual_seed(noise_seed(prompt_id(prompt, seed)))
        self.latents = pipe.prepare_latents(
            1, 12, 32, 32, torch.float32, torch.device("cpu"), generator
        )
        pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / STEPS, STEPS))
        self.sigmas = pipe.scheduler.sigmas

    def branch(
        self, z: Tensor, sigma: Tensor, which: int, replaced: dict[int, Any]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        model, embeds = self.model, self.embeds[which]
        hidden, text = model.img_in(z), model.txt_in(model.txt_norm(embeds))
        temb = model.time_text_embed(sigma.reshape(1), hidden)
        rope = model.pos_embed([[(1, 8, 8)]], max_txt_seq_len=text.shape[1], device=z.device)
        residuals = []
        blocks = model.transformer_blocks
        size = len(blocks) // GROUPS
        for group in range(GROUPS):
            before = (hidden, text)
            if group in replaced:
                hidden, text = hidden + replaced[group][0], text + replaced[group][1]
            else:
                for block in blocks[group * size : (group + 1) * size]:
                    text, hidden = block(hidden, text, None, temb, rope)
            residuals.append((hidden - before[0], text - before[1]))
        return model.proj_out(model.norm_out(hidden, temb)), residuals

    def guided(
        self, z: Tensor, sigma: Tensor, replaced: dict[int, Any] | None = None
    ) -> tuple[Tensor, list[Any]]:
        outputs, residuals = [], []
        for which in (0, 1):
            own = {group: past[which] for group, past in (replaced or {}).items()}
            output, parts = self.branch(z, sigma, which, own)
            outputs.append(output)
            residuals.append(parts)
        positive, negative = outputs
        combined = negative + 4.0 * (positive - negative)
        norm = positive.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True)
        return combined * norm, residuals

    @torch.no_grad()
    def run(self) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """Velocities, deltas of one group, and of both at lag 1 by step."""
        z = self.latents
        velocities, history, joint = [], [], [np.zeros(z.numel())]
        deltas = np.zeros((STEPS, GROUPS, LAGS, z.numel()))
        for t in range(STEPS):
            velocity, residuals = self.guided(z, self.sigmas[t])
            for lag in range(1, min(LAGS, t) + 1):
                past = {g: [history[t - lag][w][g] for w in (0, 1)] for g in range(GROUPS)}
                for group in range(GROUPS):
                    other, _ = self.guided(z, self.sigmas[t], {group: past[group]})
                    deltas[t, group, lag - 1] = (other - velocity).flatten().numpy()
                if lag == 1:
                    other, _ = self.guided(z, self.sigmas[t], past)
                    joint.append((other - velocity).flatten().numpy())
            velocities.append(velocity.flatten().numpy())
            history.append(residuals)
            z = z + (self.sigmas[t + 1] - self.sigmas[t]) * velocity
        return np.stack(velocities), deltas, joint


def test_velocities_and_deltas_are_those_of_a_loop_by_hand() -> None:
    pipe = tiny_pipeline()
    stats = measure(pipe)
    for prompt in PROMPTS:
        row = stats.prompt_ids.index(prompt_id(prompt, 0))
        velocities, deltas, joint = ByHand(tiny_pipeline(), prompt).run()
        np.testing.assert_allclose(stats.velocities[row], velocities, atol=2e-4, rtol=1e-3)
        scale = np.abs(deltas).max()
        assert scale > 1e-3
        np.testing.assert_allclose(stats.deltas[row], deltas, atol=1e-3 * scale)
        steps = [list(stats.sigmas).index(sigma) for sigma in stats.response_sigmas]
        assert len(steps) >= 2
        for found, step in zip(stats.responses[row], steps, strict=True):
            first, second = deltas[step, :, 0]
            answer = first + second - joint[step]
            expected = [answer @ first, answer @ answer, first @ first]
            np.testing.assert_allclose(found[0], expected, atol=1e-2 * (first @ first))


def test_batched_prompts_give_the_statistics_of_single_ones() -> None:
    single, batched = measure(tiny_pipeline()), measure(tiny_pipeline(), batch_size=2)
    assert single.prompt_ids == batched.prompt_ids
    np.testing.assert_allclose(single.deltas, batched.deltas, atol=1e-4)
    np.testing.assert_allclose(single.velocities, batched.velocities, atol=1e-4)
    assert single.group_bytes == batched.group_bytes  # those of the longer caption


def test_merging_splits_gives_the_statistics_of_one_run() -> None:
    whole = measure(tiny_pipeline())
    parts = [measure(tiny_pipeline(), [prompt]) for prompt in PROMPTS]
    for first, second in (parts, reversed(parts)):
        merged = first.merge(second)
        assert merged.prompt_ids == whole.prompt_ids
        assert merged.group_bytes == whole.group_bytes
        np.testing.assert_allclose(merged.deltas, whole.deltas, atol=1e-6)


def test_calibration_leaves_the_pipeline_as_it_was() -> None:
    pipe = tiny_pipeline()
    before = pipe(PROMPTS[0], **tiny_arguments(output_type="pt", num_inference_steps=STEPS, seed=3))
    measure(pipe)
    modules = [pipe.transformer, pipe.scheduler, *pipe.transformer.transformer_blocks]
    for module in modules:
        assert not {"forward", "step", "set_timesteps"} & set(vars(module))
    after = pipe(PROMPTS[0], **tiny_arguments(output_type="pt", num_inference_steps=STEPS, seed=3))
    assert torch.equal(before.images, after.images)


def test_calibration_that_fails_midway_leaves_the_pipeline_as_it_was() -> None:
    pipe = tiny_pipeline()
    block, calls = pipe.transformer.transformer_blocks[1], 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 40:
            raise RuntimeError("out of memory")

    handle = block.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        measure(pipe)
    handle.remove()
    assert "forward" not in vars(pipe.transformer) and "forward" not in vars(block)
    assert "step" not in vars(pipe.scheduler) and "set_timesteps" not in vars(pipe.scheduler)


def test_image_gain_is_that_of_the_autoencoder() -> None:
    # Pixels are latents times 0.5, and [-1, 1] is halved to [0, 1]: 1/16 where nothing saturates.
    gain = measure(tiny_pipeline()).image_gain
    assert ((gain > 0.01) & (gain <= 1 / 16 + 1e-6)).all()


def test_one_group_a_block_and_groups_of_ones_own() -> None:
    pipe = tiny_pipeline()
    assert measure(pipe, groups="blocks", lags=1).num_groups == 4
    own = (Group(block_list="transformer_blocks", start=1, stop=3),)
    assert measure(pipe, groups=own, lags=1).groups == own


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 9}, "from 1 to 4"),
        ({"groups": [Group(block_list="layers", start=0, stop=1)]}, "not in this model"),
        ({"lags": 0}, "lags=0"),
        ({"prompts": []}, "non-empty"),
    ],
)
def test_bad_requests(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StatsError, match=message):
        measure(tiny_pipeline(), **changes)


def test_a_model_without_an_adapter_is_refused() -> None:
    pipe = tiny_pipeline()
    pipe.transformer = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match="Linear"):
        measure(pipe)


def test_overflowing_models_are_refused() -> None:
    pipe = tiny_pipeline()
    with torch.no_grad():
        pipe.transformer.proj_out.bias.fill_(float("nan"))
    with pytest.raises(StatsError, match="NaN"):
        measure(pipe)


def test_guidance_with_a_memory_is_refused() -> None:
    with pytest.raises(StatsError, match="keeps state between steps"):
        measure(MomentumPipeline(), PROMPTS[:1], call_kwargs={})


def test_statistics_survive_the_disk(tmp_path: Path) -> None:
    stats = measure(tiny_pipeline())
    stats.save(tmp_path / "stats.npz")
    again = CalibrationStats.load(tmp_path / "stats.npz")
    assert again.model == stats.model and again.setting == stats.setting
    np.testing.assert_array_equal(again.deltas, stats.deltas)
    assert "transformer_blocks[0:2]" in again.summary()
