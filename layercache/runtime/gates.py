"""An eager function around a module's call, put on one instance and taken off without a trace.

`nn.Module.__call__` hands a call to the instance's `_compiled_call_impl` if there is one: the slot
in which `Module.compile()` leaves its result. A gate sits in that slot and calls what stood there
before, or else the plain `_call_impl`. This makes the gate the outermost thing around the module:

- hooks that rewrite `forward` (diffusers' hook registry, accelerate's offloading) come and go
  inside it, in any order, and a skipped call skips their transfers too;
- a compiled block stays compiled and the gate stays eager, so that decisions cause no recompiling;
- `forward`, the class, the parameters and the state dict are never touched, and PyTorch drops the
  slot when it copies or pickles a module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

Call = Callable[..., Any]
Handler = Callable[[Call, tuple[Any, ...], dict[str, Any]], Any]
"""(the wrapped call, positional arguments, keyword arguments) to what the module returns."""

_SLOT = "_compiled_call_impl"


class Gate:
    """One module's gate. `handler` decides whether and how the wrapped call is made."""

    def __init__(self, module: nn.Module, handler: Handler) -> None:
        self.module = module
        self.handler = handler
        self.inner: Call = module._call_impl
        self._displaced: Call | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.handler(self.inner, args, kwargs)

    def install(self) -> None:
        """Take the slot, or take it back from a compiled call that was put there since."""
        # Through the instance's dictionary, since torch.compile's wrapper forwards attributes
        # that are set on it to the module inside.
        slots = vars(self.module)
        current = slots.get(_SLOT)
        if current is self:
            return
        self._displaced = current
        self.inner = current if current is not None else self.module._call_impl
        slots[_SLOT] = self

    def replace(self, inner: Call) -> None:
        """Wrap another call, such as a compiled one; it stays when the gate is removed."""
        self.inner = self._displaced = inner

    def remove(self) -> None:
        """Leave the slot as it would be without the gate."""
        slots = vars(self.module)
        if slots.get(_SLOT) is self:
            del slots[_SLOT]
            if self._displaced is not None:
                slots[_SLOT] = self._displaced


def gate_of(module: nn.Module) -> Gate | None:
    """The gate on a module, if there is one."""
    current = vars(module).get(_SLOT)
    return current if isinstance(current, Gate) else None


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` or `Module.compile` was applied to this very module."""
    if hasattr(module, "_orig_mod"):
        return True
    current = vars(module).get(_SLOT)
    return (current._displaced if isinstance(current, Gate) else current) is not None
