"""`Group`: blocks that a plan computes or caches together."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from layercache.errors import StatsError


@dataclass(frozen=True, kw_only=True)
class Group:
    """Contiguous blocks `start` (included) to `stop` (excluded) of one block list."""

    block_list: str
    start: int
    stop: int

    def __post_init__(self) -> None:
        for name in ("start", "stop"):
            # Integers of other libraries too; they have to fit into JSON.
            object.__setattr__(self, name, int(operator.index(getattr(self, name))))
        if not isinstance(self.block_list, str):
            raise TypeError(f"block_list is {self.block_list!r}, not text")
        if not 0 <= self.start < self.stop:
            raise StatsError(
                f"group {self.block_list}[{self.start}:{self.stop}] has no blocks: "
                "0 <= start < stop must hold"
            )

    @property
    def name(self) -> str:
        """For example `transformer_blocks[0:8]`."""
        return f"{self.block_list}[{self.start}:{self.stop}]"
