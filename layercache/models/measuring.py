"""What a group of blocks adds to its streams, apart from what the model adds between the blocks.

Models may add to the streams between two blocks (a ControlNet, a text that is appended again).
Those additions are not part of the group's residual, since the model repeats them when the group is
predicted:

    r = sum over uninterrupted segments of (last output - first input)

which is the last output minus the first input where nothing is injected.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from layercache.errors import UnsupportedModelError
from layercache.models._foreign import changes_of
from layercache.models.adapters import BlockList, check_shapes, read_outputs, read_streams
from layercache.models.gates import Call
from layercache.models.tensors import finite

Streams = dict[str, Tensor]


class ResidualMeter:
    """Measures one group during one forward.

    Args:
        block_list: The declaration of the list that the group is in.
    """

    def __init__(self, block_list: BlockList) -> None:
        self._block_list = block_list
        self._segment: Streams | None = None
        self._versions: dict[str, int | None] = {}
        self._sum: Streams = {}
        self.outputs: Streams = {}

    def run(
        self, block: nn.Module, inner: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a block and note what it did; returns what it returned.

        Raises:
            UnsupportedModelError: The block, or something between two blocks, writes into a tensor
                that the measurement needs.
        """
        streams = read_streams(self._block_list, block, args, kwargs)
        if self._segment is None:
            self._segment = streams
        elif not self._continues(streams):
            self._close()
            self._segment = streams
        versions = {name: changes_of(tensor) for name, tensor in streams.items()}
        output = inner(*args, **kwargs)
        self.outputs = read_outputs(self._block_list, output)
        self._check(block, streams, versions)
        self._versions = {name: changes_of(tensor) for name, tensor in self.outputs.items()}
        if self._block_list.in_place or None in self._versions.values():
            self._close()
        return output

    def residual(self) -> Streams:
        """The sum, once all blocks have run."""
        self._close()
        return self._sum

    def _continues(self, streams: Streams) -> bool:
        """Whether a block's inputs are the outputs of the block before, unchanged."""
        for name, tensor in self.outputs.items():
            given = streams.get(name)
            if given is tensor and changes_of(given) != self._versions[name]:
                raise UnsupportedModelError(
                    f"something wrote into the output {name!r} of a block of "
                    f"{self._block_list.name!r} before the next block ran: declare the list with "
                    "in_place=True in its adapter"
                )
            if given is not tensor:
                return False
        return True

    def _check(self, block: nn.Module, streams: Streams, versions: dict[str, int | None]) -> None:
        check_shapes(block, streams, self.outputs)
        for name, version in versions.items():
            if changes_of(streams[name]) != version:
                raise UnsupportedModelError(
                    f"{type(block).__name__} writes into its own input {name!r}, so the group's "
                    "residual cannot be measured: such a model is not supported"
                )

    def _close(self) -> None:
        if self._segment is None:
            return
        for name, tensor in self.outputs.items():
            delta = finite(tensor - self._segment[name].to(tensor.device))
            self._sum[name] = (
                finite(self._sum[name].to(delta.device) + delta) if name in self._sum else delta
            )
        for name in set(self._sum) - set(self.outputs):
            # The last block no longer returns this stream, so nobody reads it from here on.
            del self._sum[name]
        self._segment = None
