"""Group offloading where one offload group holds blocks on both sides of a plan group's border.

diffusers' group offloading loads the weights of several blocks when the first of them is called and
unloads them after the last. A skipped block makes no transfer, which is what one wants, unless its
offload group also holds a block that is computed: then the skipped block still has to make it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from layercache.models._foreign import hook_registry

Transfers = dict[int, list[Callable[[], None]]]
"""Position in the block list to what a skip of that block still has to do."""

_HOOK = "group_offloading"


def shared_transfers(blocks: Sequence[nn.Module], positions: range) -> Transfers:
    """The transfers that skipped blocks at `positions` of the list owe to its other blocks."""
    inside = {id(blocks[position]) for position in positions}
    found: Transfers = {}
    for position in positions:
        block = blocks[position]
        registry = hook_registry(block)
        hook = registry.get_hook(_HOOK) if registry is not None else None
        if hook is None or all(id(module) in inside for module in hook.group.modules):
            continue
        if hook.group.onload_leader is block:
            found.setdefault(position, []).append(hook.group.onload_)
        if hook.group.offload_leader is block:
            found.setdefault(position, []).append(hook.group.offload_)
    return found
