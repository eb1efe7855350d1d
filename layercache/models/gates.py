"""An eager function around a module's call, put on one instance and taken off without a trace.

`nn.Module.__call__` hands a call to the instance's `_compiled_call_impl` if there is one: the slot
in which `Module.compile()` leaves its result. A gate sits in that slot and calls what stood there
before, or else the plain `_call_impl`. This makes the gate the outermost thing around the module:

- hooks that rewrite `forward` (diffusers' hook registry, accelerate's offloading) come and go
  inside it, in any order, and a skipped call skips their transfers too;
- a compiled block stays compiled and the gate stays eager, so that decisions cause no recompiling;
- `forward`, the class, the parameters and the state dict are never touched, and PyTorch drops the
  slot when it copies or pickles a module.

One kind of hook has to run outside a gate: diffusers' context parallelism splits the sequence in a
hook on the first block, and a group has to see the part, not the whole. The gate of such a block
sits where that hook keeps the function that it calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from layercache.errors import UnsupportedModelError
from layercache.models._foreign import (
    CALL_SLOT,
    compiled_from,
    hook_references,
    hook_registry,
    plain_call,
)

Call = Callable[..., Any]
Handler = Callable[[Call, tuple[Any, ...], dict[str, Any]], Any]
"""(the wrapped call, positional arguments, keyword arguments) to what the module returns."""

_SPLIT_HOOK = "cp_input"


class Gate:
    """One module's gate. `handler` decides whether and how the wrapped call is made.

    Args:
        module: The module.
        handler: What is done instead of a call.
        streams: Names of the module's arguments that have to arrive as a split sequence, where
            there is one.
    """

    def __init__(self, module: nn.Module, handler: Handler, streams: Sequence[str] = ()) -> None:
        self.module = module
        self.handler = handler
        self.inner: Call = plain_call(module)
        self._streams = streams
        self._displaced: Call | None = None
        self._slots: dict[str, Any] = vars(module)
        self._key = CALL_SLOT

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.handler(self.inner, args, kwargs)

    @property
    def within_split(self) -> bool:
        """Whether this gate sits inside a hook that splits the sequence."""
        return self._key != CALL_SLOT

    def install(self) -> None:
        """Take the slot, or take it back from a compiled call that was put there since.

        Raises:
            UnsupportedModelError: The block is compiled, and the sequence is split inside it.
        """
        # Through dictionaries, since torch.compile's wrapper forwards attributes that are set on it
        # to the module inside.
        split = _splitting_reference(self.module, self._streams)
        slots, key = (vars(self.module), CALL_SLOT) if split is None else (vars(split), "forward")
        if slots is not self._slots:
            self.remove()
            self._slots, self._key = slots, key
        if self.within_split and vars(self.module).get(CALL_SLOT) is not None:
            raise UnsupportedModelError(
                f"a {type(self.module).__name__} is compiled and context parallelism splits the "
                "sequence in it, so that a plan cannot skip it: leave this block uncompiled "
                "(compile_blocks does), or begin the group one block later"
            )
        current = slots.get(key)
        if current is self:
            return
        self._displaced = current
        self.inner = current if current is not None else plain_call(self.module)
        slots[key] = self

    def replace(self, inner: Call) -> None:
        """Wrap another call, such as a compiled one; it stays when the gate is removed."""
        self.inner = self._displaced = inner

    def remove(self) -> None:
        """Leave the slot as it would be without the gate."""
        if self._slots.get(self._key) is self:
            del self._slots[self._key]
            if self._displaced is not None:
                self._slots[self._key] = self._displaced
        if vars(self.module).get("forward") is self:
            # The hook was taken off meanwhile and left there what it used to call.
            vars(self.module)["forward"] = self._displaced


def gate_of(module: nn.Module) -> Gate | None:
    """The gate on a module, if there is one."""
    references = hook_references(hook_registry(module))
    inside = [vars(reference).get("forward") for reference in references]
    for candidate in (vars(module).get(CALL_SLOT), *inside):
        if isinstance(candidate, Gate):
            return candidate
    return None


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` or `Module.compile` was applied to this very module."""
    if compiled_from(module) is not None:
        return True
    current = vars(module).get(CALL_SLOT)
    return (current._displaced if isinstance(current, Gate) else current) is not None


def splits_sequence(module: nn.Module, streams: Sequence[str]) -> bool:
    """Whether context parallelism splits one of these arguments of the module."""
    return _splitting_reference(module, streams) is not None


def _splitting_reference(module: nn.Module, streams: Sequence[str]) -> Any:
    """What holds the function that a sequence-splitting hook calls, if one splits a stream."""
    registry = hook_registry(module)
    if registry is None or not streams:
        return None
    for name, hook in registry.hooks.items():
        if name.startswith(_SPLIT_HOOK) and set(getattr(hook, "metadata", ())) & set(streams):
            return hook.fn_ref
    return None
