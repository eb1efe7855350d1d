"""What LayerCache has to know of a transformer: where its blocks are and which tensors they carry.

An adapter is a declaration, never a copied forward: the block lists in execution order and, for
each, which arguments of a block are *streams* (tensors that the block returns updated) and in which
order the block returns them. `layercache.models._table` holds the declarations for diffusers.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn

from layercache.errors import UnsupportedModelError
from layercache.models._foreign import compiled_from


@dataclass(frozen=True)
class BlockList:
    """One `ModuleList` of a transformer whose blocks all carry the same streams.

    Args:
        name: Attribute of the transformer that holds the list.
        streams: Names of the block's arguments that are streams.
        outputs: The same names in the order in which a block returns them. A block with one
            output returns the bare tensor, one with several a tuple.
        in_place: The transformer may write into a block's output after the block returned it
            (a ControlNet added with `x[...] = ...`), so that a difference must be taken at once.
        wrapped: A block with one output returns it in a tuple of one.

    Example:
        >>> BlockList("blocks", streams=("hidden_states",), outputs=("hidden_states",)).name
        'blocks'
    """

    name: str
    streams: tuple[str, ...]
    outputs: tuple[str, ...]
    in_place: bool = False
    wrapped: bool = False

    def __post_init__(self) -> None:
        for field in ("streams", "outputs"):
            names = getattr(self, field)
            if isinstance(names, str):
                raise UnsupportedModelError(
                    f"block list {self.name!r} declares {field} {names!r}, a string: write "
                    f"({names!r},)"
                )
            object.__setattr__(self, field, tuple(names))
            if len(set(names)) < len(names):
                raise UnsupportedModelError(
                    f"block list {self.name!r} declares {field} {names}: name each stream once"
                )
        if self.wrapped and len(self.outputs) != 1:
            raise UnsupportedModelError(
                f"block list {self.name!r} declares wrapped=True and outputs {self.outputs}: only "
                "a block with one output can have it in a tuple of one"
            )
        if not self.outputs or set(self.outputs) != set(self.streams):
            raise UnsupportedModelError(
                f"block list {self.name!r} declares streams {self.streams} and outputs "
                f"{self.outputs}: name the same streams in both, at least one"
            )


@dataclass(frozen=True)
class Adapter:
    """The block lists of one transformer class, in execution order.

    Args:
        class_name: Name of the transformer's class; subclasses match too.
        block_lists: Lists of the class. One that a given model lacks is left out for that model.
            None at all if nothing is known of its blocks: such a model has no groups.
        timeless: Dotted names of lists of blocks that see no timestep, such as those that refine
            the text: their output follows from their arguments alone, which are the same at every
            step. They are no groups; the runtime computes them once a generation. One that a given
            model lacks is left out for that model.

    Example:
        >>> image = BlockList("blocks", ("hidden_states",), ("hidden_states",))
        >>> Adapter("MyTransformer2DModel", (image,)).class_name
        'MyTransformer2DModel'
    """

    class_name: str
    block_lists: tuple[BlockList, ...]
    timeless: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        lists: Any = self.block_lists
        lists = tuple(lists) if isinstance(lists, (list, tuple)) else (lists,)
        if not all(isinstance(block_list, BlockList) for block_list in lists):
            raise UnsupportedModelError(
                f"the adapter of {self.class_name} declares block_lists {self.block_lists!r}: give "
                "a tuple of BlockList"
            )
        object.__setattr__(self, "block_lists", lists)
        names = (self.timeless,) if isinstance(self.timeless, str) else tuple(self.timeless)
        if both := {block_list.name for block_list in lists} & set(names):
            raise UnsupportedModelError(
                f"the adapter of {self.class_name} declares {sorted(both)} as block_lists and as "
                "timeless: what a plan may cache sees the timestep, so name each list once"
            )
        object.__setattr__(self, "timeless", names)

    def block_list(self, name: str) -> BlockList:
        """The declaration of the list `name`. Raises `UnsupportedModelError` if there is none."""
        for block_list in self.block_lists:
            if block_list.name == name:
                return block_list
        raise UnsupportedModelError(
            f"{self.class_name} has no block list {name!r}; its adapter declares "
            + ", ".join(repr(b.name) for b in self.block_lists)
        )


_registered: dict[str, Adapter] = {}


def register_adapter(adapter: Adapter) -> None:
    """Teach LayerCache a transformer class, for this process. A second call replaces the first.

    Example:
        >>> image = BlockList("blocks", ("hidden_states",), ("hidden_states",))
        >>> register_adapter(Adapter("MyTransformer2DModel", (image,)))
    """
    _registered[adapter.class_name] = adapter


def supported_models() -> tuple[str, ...]:
    """Names of the transformer classes that have an adapter, sorted."""
    return tuple(sorted(_known()))


def _known() -> dict[str, Adapter]:
    from layercache.models._table import ADAPTERS

    return ADAPTERS | _registered


def adapter_for(transformer: nn.Module, *, required: bool = True) -> Adapter:
    """The adapter of a model, by the name of its class or of a base class.

    Args:
        transformer: The model.
        required: Whether a model that nothing is known of is an error. Else its adapter has no
            block lists, which is enough for plans of whole steps.

    Raises:
        UnsupportedModelError: No class in the model's ancestry has an adapter, or the model has
            none of the lists that its adapter declares.
    """
    module, known = unwrap(transformer), _known()
    for ancestor in type(module).__mro__:
        adapter = known.get(ancestor.__name__)
        if adapter is not None:
            present = tuple(b for b in adapter.block_lists if _has_blocks(module, b.name))
            if adapter.block_lists and not present:
                raise UnsupportedModelError(
                    f"{type(module).__name__} has none of the block lists that its adapter "
                    f"declares ({', '.join(b.name for b in adapter.block_lists)}): register an "
                    "adapter for this class with layercache.models.register_adapter"
                )
            timeless = tuple(name for name in adapter.timeless if _has_blocks(module, name))
            return Adapter(type(module).__name__, present, timeless)
    if not required:
        return Adapter(type(module).__name__, ())
    raise UnsupportedModelError(
        f"no adapter knows {type(module).__name__}, so its blocks cannot be grouped (plans of "
        f"whole steps need no adapter); the known transformers are {', '.join(supported_models())}."
        " Declare yours with layercache.models.register_adapter (docs/adding-a-model.md)"
    )


def unwrap(transformer: nn.Module) -> nn.Module:
    """The model itself, also if `torch.compile` wrapped it."""
    return compiled_from(transformer) or transformer


def blocks_of(transformer: nn.Module, block_list: BlockList) -> list[nn.Module]:
    """The blocks of one list, in execution order."""
    return list(getattr(unwrap(transformer), block_list.name))


def timeless_blocks(transformer: nn.Module, adapter: Adapter) -> list[nn.Module]:
    """The blocks that see no timestep, as the adapter declares them."""
    module = unwrap(transformer)
    lists: list[Any] = [module.get_submodule(name) for name in adapter.timeless]
    return [block for blocks in lists for block in blocks]


def read_streams(
    block_list: BlockList, block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The streams among the arguments of one call of a block.

    A stream that the call leaves out or passes as `None` is not in the result.

    Raises:
        UnsupportedModelError: The block takes no argument of a stream's name.
    """
    found: dict[str, Tensor] = {}
    block_class: Any = type(block)
    positions = _positions(block_class, block_list.streams)
    for name, position in zip(block_list.streams, positions, strict=True):
        value = args[position] if position < len(args) else kwargs.get(name)
        if value is not None:
            found[name] = value
    return found


def read_outputs(block_list: BlockList, output: Any) -> dict[str, Tensor]:
    """The streams that a block returned; one returned as `None` is not in the result.

    Raises:
        UnsupportedModelError: The block returned another number of values than declared.
    """
    names = block_list.outputs
    if isinstance(output, Tensor):
        values: Sequence[Any] = (output,)
    elif isinstance(output, (tuple, list)):
        values = output
    else:
        values = ()
    bare = len(names) == 1 and not block_list.wrapped
    if len(values) != len(names) or bare != isinstance(output, Tensor):
        raise UnsupportedModelError(
            f"a block of {block_list.name!r} returned {_shape_of(output)} where the adapter "
            f"declares {', '.join(names)}{' as a bare tensor' if bare else ' in a tuple'}: correct "
            "the adapter's outputs, or its wrapped="
        )
    return {name: v for name, v in zip(names, values, strict=True) if v is not None}


def write_outputs(block_list: BlockList, streams: Mapping[str, Tensor]) -> Any:
    """What a block would return for these streams; a stream that is not given becomes `None`."""
    if len(block_list.outputs) == 1 and not block_list.wrapped:
        return streams[block_list.outputs[0]]
    return tuple(streams.get(name) for name in block_list.outputs)


def check_signature(block_list: BlockList, block: nn.Module) -> None:
    """Raise `UnsupportedModelError` unless the block takes the declared streams as arguments."""
    block_class: Any = type(block)
    _positions(block_class, block_list.streams)


def check_shapes(
    block: nn.Module, streams: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
) -> None:
    """Raise `UnsupportedModelError` unless every output has the shape of its stream."""
    for name, tensor in outputs.items():
        given = streams.get(name)
        if given is None or given.shape != tensor.shape:
            raise UnsupportedModelError(
                f"{type(block).__name__} returned {name!r} of shape {tuple(tensor.shape)} for "
                f"{'no input' if given is None else f'input {tuple(given.shape)}'}: it is not "
                "a residual stream; correct the adapter"
            )


@cache
def _positions(block_class: Any, streams: tuple[str, ...]) -> tuple[int, ...]:
    parameters = list(inspect.signature(block_class.forward).parameters)[1:]
    missing = [name for name in streams if name not in parameters]
    if missing:
        raise UnsupportedModelError(
            f"{block_class.__name__}.forward takes no argument {missing[0]!r}; it takes "
            f"{', '.join(parameters)}: correct the adapter's streams"
        )
    return tuple(parameters.index(name) for name in streams)


def _has_blocks(module: nn.Module, name: str) -> bool:
    blocks: Any = module
    for part in name.split("."):
        blocks = getattr(blocks, part, None)
    return isinstance(blocks, nn.ModuleList) and len(blocks) > 0


def _shape_of(output: Any) -> str:
    if isinstance(output, (tuple, list)):
        return f"a {type(output).__name__} of {len(output)}"
    return f"a {type(output).__name__}"
