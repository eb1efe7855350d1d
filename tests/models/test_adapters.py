"""Reading and writing streams, looking adapters up, and what the error messages say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layercache.errors import UnsupportedModelError
from layercache.models import Adapter, BlockList, adapter_for, register_adapter, supported_models
from layercache.models.adapters import (
    _registered,
    blocks_of,
    check_signature,
    read_outputs,
    read_streams,
    unwrap,
    write_outputs,
)
from tests.models.zoo import build

BOTH = BlockList("blocks", streams=("image", "text"), outputs=("text", "image"))
ONE = BlockList("blocks", streams=("image",), outputs=("image",))


class Block(nn.Module):
    """Streams that are not its first arguments."""

    def forward(self, time: float, image: torch.Tensor, text: torch.Tensor | None = None) -> None:
        """Only the signature matters."""


@pytest.mark.parametrize("by_name", [0, 1, 2])
def test_streams_are_read_by_position_and_by_name(by_name: int) -> None:
    image, text = torch.zeros(1), torch.ones(2)
    arguments = {"time": 0.5, "image": image, "text": text}
    names = list(arguments)
    args = tuple(arguments[name] for name in names[: 3 - by_name])
    kwargs = {name: arguments[name] for name in names[3 - by_name :]}
    found = read_streams(BOTH, Block(), args, kwargs)
    assert found["image"] is image
    assert found["text"] is text


def test_an_absent_stream_is_left_out() -> None:
    image = torch.zeros(1)
    assert list(read_streams(BOTH, Block(), (0.5, image), {})) == ["image"]
    assert list(read_streams(BOTH, Block(), (0.5, image, None), {})) == ["image"]


def test_outputs_are_read_and_written_in_the_declared_order() -> None:
    image, text = torch.zeros(1), torch.ones(2)
    output = write_outputs(BOTH, {"image": image, "text": text})
    assert output[0] is text
    assert output[1] is image
    assert read_outputs(BOTH, output) == {"text": text, "image": image}
    assert write_outputs(ONE, {"image": image}) is image
    assert read_outputs(ONE, image)["image"] is image


def test_a_stream_that_is_none_stays_none() -> None:
    image = torch.zeros(1)
    assert list(read_outputs(BOTH, (None, image))) == ["image"]
    assert write_outputs(BOTH, {"image": image})[0] is None


@pytest.mark.parametrize(
    ("block_list", "output", "words"),
    [
        (BOTH, torch.zeros(2), "returned a Tensor where the adapter declares text, image"),
        (BOTH, (torch.zeros(1),), "returned a tuple of 1"),
        (ONE, [torch.zeros(1)] * 3, "returned a list of 3"),
        (ONE, "text", "returned a str"),
    ],
)
def test_another_output_than_declared_is_an_error(
    block_list: BlockList, output: object, words: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        read_outputs(block_list, output)


def test_an_unknown_argument_is_named() -> None:
    wrong = BlockList("blocks", streams=("video",), outputs=("video",))
    with pytest.raises(
        UnsupportedModelError, match=r"no argument 'video'; it takes time, image, text"
    ):
        check_signature(wrong, Block())


def test_streams_and_outputs_must_agree() -> None:
    with pytest.raises(UnsupportedModelError, match="name the same streams in both"):
        BlockList("blocks", streams=("image",), outputs=("image", "text"))
    with pytest.raises(UnsupportedModelError, match="at least one"):
        BlockList("blocks", streams=(), outputs=())


def test_slips_in_a_declaration_are_caught() -> None:
    with pytest.raises(UnsupportedModelError, match=r"a string: write \('image',\)"):
        BlockList("blocks", streams="image", outputs=("image",))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="name each stream once"):
        BlockList("blocks", streams=("image", "image"), outputs=("image",))
    with pytest.raises(UnsupportedModelError, match="a tuple of BlockList"):
        Adapter("Name", ("blocks",))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match=r"\['blocks'\] as block_lists and as timeless"):
        Adapter("Name", (ONE,), ("refiner", "blocks"))
    assert Adapter("One", ONE, "refiner").timeless == ("refiner",)  # type: ignore[arg-type]
    # Lists and a bare BlockList mean what they say.
    listed = BlockList("blocks", streams=["image"], outputs=["image"])  # type: ignore[arg-type]
    assert listed == ONE and hash(listed) == hash(ONE)
    assert Adapter("One", ONE).block_lists == (ONE,)  # type: ignore[arg-type]


def test_an_unknown_model_is_told_what_is_known_and_what_to_do() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        adapter_for(nn.Linear(1, 1))
    message = str(caught.value)
    assert "no adapter knows Linear" in message
    assert "register_adapter" in message
    assert all(name in message for name in supported_models())
    assert adapter_for(nn.Linear(1, 1), required=False) == Adapter("Linear", ())


def test_a_subclass_and_a_compiled_model_are_known() -> None:
    model, _ = build("QwenImageTransformer2DModel")
    model.__class__ = type("Finetuned", (type(model),), {})
    assert adapter_for(model).class_name == "Finetuned"
    compiled = torch.compile(model, backend="eager")
    assert unwrap(compiled) is model
    block_list = adapter_for(compiled).block_list("transformer_blocks")
    assert blocks_of(compiled, block_list) == list(model.transformer_blocks)


def test_a_model_without_the_declared_lists_is_refused() -> None:
    before = dict(_registered)
    register_adapter(Adapter("Linear", (ONE,)))
    try:
        assert "Linear" in supported_models()
        with pytest.raises(UnsupportedModelError, match="none of the block lists"):
            adapter_for(nn.Linear(1, 1))
        with pytest.raises(UnsupportedModelError, match="no block list 'layers'"):
            Adapter("Linear", (ONE,)).block_list("layers")
    finally:
        _registered.clear()
        _registered.update(before)
