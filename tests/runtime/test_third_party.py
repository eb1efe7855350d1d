"""Models of third parties: the worked example of the documents, and adapters that are wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layercache.errors import UnsupportedModelError
from layercache.models import Adapter, BlockList, register_adapter
from layercache.models.adapters import _registered
from layercache.runtime import apply_plan, check_adapter
from tests.models.zoo import BUILDERS, build
from tests.runtime.harness import LoopPipeline, SlowRuntime, group, make_plan, traces

GUIDE = Path(__file__).parents[2] / "docs" / "adding-a-model.md"


@pytest.fixture(autouse=True)
def _own_registry() -> Iterator[None]:
    before = dict(_registered)
    yield
    _registered.clear()
    _registered.update(before)


class Block(nn.Module):
    """Two streams of one shape, returned text first; `form` says how."""

    form = "tuple"

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, image: Tensor, text: Tensor, scale: Tensor) -> Any:
        mixed = torch.tanh(self.mix(image + text))
        text, image = text + 0.5 * mixed, image + scale * mixed
        return [text, image] if self.form == "list" else (text, image)


class Model(nn.Module):
    """A transformer that is not from diffusers."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.unused = nn.ModuleList(Block() for _ in range(2))

    def forward(
        self, hidden_states: Tensor, text: Tensor, timestep: Tensor, return_dict: bool = True
    ) -> Any:
        image = hidden_states
        for block in self.blocks:
            text, image = block(image, text, scale=timestep)
        return (image - text,)


def inputs() -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 8),
        "text": torch.randn(2, 4, 8),
        "timestep": torch.tensor(1.0),
    }


def declare(**changes: Any) -> None:
    declared: dict[str, Any] = {"streams": ("image", "text"), "outputs": ("text", "image")}
    register_adapter(Adapter("Model", (BlockList("blocks", **(declared | changes)),)))


@pytest.mark.parametrize("form", ["tuple", "list"])
def test_a_registered_adapter_is_enough(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Block, "form", form)
    pipe = LoopPipeline(Model(), inputs(), guided=False)
    with pytest.raises(UnsupportedModelError, match="no adapter knows Model"):
        check_adapter(pipe.transformer, **inputs())
    declare()
    units = [group("blocks", 0, 2, "##1#"), group("blocks", 3, 4, "#0#2")]
    expected = SlowRuntime(pipe, 4, units).run()
    with apply_plan(pipe, make_plan(pipe, 4, units)) as run:
        assert torch.allclose(pipe(4), expected, atol=1e-6)
    assert run.report().warnings == ()
    assert check_adapter(pipe.transformer, **inputs())["blocks"] < 1e-6


class Wrapping(nn.Module):
    """One stream, in a tuple of one, as many language models' blocks return it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, tokens: Tensor, scale: Tensor) -> tuple[Tensor]:
        return (tokens + scale * torch.tanh(self.mix(tokens)),)


class WrappingModel(nn.Module):
    """Takes its blocks' outputs out of their tuples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Wrapping() for _ in range(3))

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True) -> Any:
        for block in self.blocks:
            hidden_states = block(hidden_states, timestep)[0]
        return (hidden_states,)


def test_an_output_in_a_tuple_of_one_has_to_be_declared() -> None:
    pipe = LoopPipeline(WrappingModel(), {k: v for k, v in inputs().items() if k != "text"}, False)
    units = [group("blocks", 0, 3, "#0#2")]
    tokens = ("tokens",)
    register_adapter(Adapter("WrappingModel", (BlockList("blocks", tokens, tokens),)))
    run = apply_plan(pipe, make_plan(pipe, 4, units))
    with pytest.raises(UnsupportedModelError, match=r"a tuple of 1 where .* wrapped="):
        pipe(4)
    assert not run.active
    register_adapter(Adapter("WrappingModel", (BlockList("blocks", tokens, tokens, wrapped=True),)))
    expected = SlowRuntime(pipe, 4, units).run()
    with apply_plan(pipe, make_plan(pipe, 4, units)) as run:
        assert torch.allclose(pipe(4), expected, atol=1e-6)
    assert run.report().warnings == ()


# -- adapters that are wrong -----------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "order of outputs": ({"outputs": ("image", "text")}, "correct the order of the adapter's outp"),
    "a stream too few": (
        {"streams": ("image",), "outputs": ("image",)},
        "a tuple of 2 where the adapter declares image as a bare tensor",
    ),
    "a stream too many": (
        {"streams": ("image", "text", "scale"), "outputs": ("text", "image", "scale")},
        "a tuple of 2 where the adapter declares text, image, scale in a tuple",
    ),
    "no stream": (
        {"streams": ("image", "scale"), "outputs": ("scale", "image")},
        "returned 'scale' of shape .* it is not a residual stream",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_adapter_is_found_at_the_first_forward_and_everything_taken_off(wrong: str) -> None:
    changes, words = WRONG[wrong]
    pipe = LoopPipeline(Model(), inputs(), guided=False)
    expected = pipe(4)
    before = traces(pipe.transformer)
    declare(**changes)
    with pytest.raises(UnsupportedModelError, match=words):
        check_adapter(pipe.transformer, **inputs())
    # The group is of one block, and predicted late: its own checks would see nothing yet.
    run = apply_plan(pipe, make_plan(pipe, 4, [group("blocks", 3, 4, "###0")]))
    with pytest.raises(UnsupportedModelError, match=words):
        pipe(4)
    assert not run.active
    assert traces(pipe.transformer) == before
    assert "step" not in vars(pipe.scheduler)
    assert torch.equal(pipe(4), expected)


def test_a_list_that_does_not_run_is_found() -> None:
    pipe = LoopPipeline(Model(), inputs(), guided=False)
    both = {"streams": ("image", "text"), "outputs": ("text", "image")}
    lists = (BlockList("blocks", **both), BlockList("unused", **both))
    register_adapter(Adapter("Model", lists))
    run = apply_plan(pipe, make_plan(pipe, 3, [group("unused", 0, 2, "##1")]))
    with pytest.raises(UnsupportedModelError, match="without calling a block of 'unused'"):
        pipe(3)
    assert not run.active


def test_lists_in_another_order_are_found() -> None:
    name = "FluxTransformer2DModel"
    pipe = LoopPipeline(*build(name))
    both = {"streams": ("hidden_states", "encoder_hidden_states"),
            "outputs": ("encoder_hidden_states", "hidden_states")}  # fmt: skip
    lists = ("single_transformer_blocks", "transformer_blocks")
    register_adapter(Adapter(name, tuple(BlockList(n, **both) for n in lists)))
    units = [group(n, 0, 3, "##1") for n in lists]
    with (
        apply_plan(pipe, make_plan(pipe, 3, units)),
        pytest.raises(UnsupportedModelError, match="in the order in which the adapter declares"),
    ):
        pipe(3)


class Skipping(Model):
    """The last block is also given what the first one returned."""

    def forward(
        self, hidden_states: Tensor, text: Tensor, timestep: Tensor, return_dict: bool = True
    ) -> Any:
        image, first, *middle, last = hidden_states, *self.blocks
        text, early = first(image, text, scale=timestep)
        image = early
        for block in middle:
            text, image = block(image, text, scale=timestep)
        text, image = last(image, text, scale=early)
        return (image,)


def test_a_connection_across_blocks_is_found() -> None:
    streams = {"streams": ("image", "text"), "outputs": ("text", "image")}
    register_adapter(Adapter("Skipping", (BlockList("blocks", **streams),)))
    with pytest.raises(UnsupportedModelError, match=r"block 3 .* what an earlier block returned"):
        check_adapter(Skipping(), **inputs())


class Leaking(Model):
    """A block changes something besides its streams, which a skip leaves unchanged."""

    def forward(
        self, hidden_states: Tensor, text: Tensor, timestep: Tensor, return_dict: bool = True
    ) -> Any:
        image, count = hidden_states, []
        handles = [b.mix.register_forward_hook(lambda *_: count.append(1)) for b in self.blocks]
        for block in self.blocks:
            text, image = block(image, text, scale=timestep)
        for handle in handles:
            handle.remove()
        return (image * len(count),)


def test_check_adapter_finds_what_no_declaration_shows() -> None:
    streams = {"streams": ("image", "text"), "outputs": ("text", "image")}
    register_adapter(Adapter("Leaking", (BlockList("blocks", **streams),)))
    model = Leaking()
    before = traces(model)
    with pytest.raises(UnsupportedModelError, match=r"blocks 0:4 .* change the output of Leaking"):
        check_adapter(model, **inputs())
    assert traces(model) == before


@pytest.mark.parametrize("name", BUILDERS)
def test_every_adapter_passes_its_check(name: str) -> None:
    model, arguments = build(name)
    before = {k: v for k, v in traces(model).items()}
    assert max(check_adapter(model, **arguments).values()) < 1e-6
    assert traces(model) == before


# -- the document ----------------------------------------------------------------------------------


def test_the_guide_runs_as_it_stands() -> None:
    code = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(code) >= 2
    names: dict[str, Any] = {"__name__": "guide"}
    for part in code:
        exec(compile(part, str(GUIDE), "exec"), names)
    assert max(names["deviations"].values()) < 1e-6
    assert names["run"].report().warnings == ()
