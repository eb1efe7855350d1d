"""A method of one instance, wrapped: taken off in any order, and safe to copy and to pickle.

The wrapper stands in the instance's dictionary. Several may stand on one another; taking off one in
the middle leaves the others. Copies of the instance (diffusers' LTX2 copies its scheduler in every
call) get the plain method, bound to the copy: a closure would be shared, and the copy would act on
the original. A shallow copy shares the wrapper all the same, until `own_methods` takes it off.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

Function = Callable[..., Any]


class Wrapped:
    """What stands in the instance's dictionary: calls `function(inner, ...)`."""

    def __init__(self, owner: Any, name: str, function: Function) -> None:
        # Callers look at the signature for what they may pass; it is found through __wrapped__.
        functools.update_wrapper(self, getattr(owner, name), updated=())
        self.owner, self.name, self.function = owner, name, function
        self.inner: Function = getattr(owner, name)
        self.displaced = vars(owner).get(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.inner, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.displaced is not None:
            return _same, (self.displaced,)
        # While the owner is being rebuilt its dictionary is empty, so this is its class's method.
        return getattr, (self.owner, self.name)


def wrap_method(owner: Any, name: str, function: Function) -> Callable[[], None]:
    """Put `function(inner, *args, **kwargs)` in the place of a method of this one instance.

    Returns:
        A function that takes it off; a second call does nothing.
    """
    wrapped = Wrapped(owner, name, function)
    vars(owner)[name] = wrapped

    def restore() -> None:
        slots = vars(owner)
        if slots.get(name) is wrapped:
            del slots[name]
            if wrapped.displaced is not None:
                slots[name] = wrapped.displaced
            return
        outer = slots.get(name)
        while isinstance(outer, Wrapped):
            if outer.displaced is wrapped:
                outer.inner, outer.displaced = wrapped.inner, wrapped.displaced
                return
            outer = outer.displaced

    return restore


def wrappers(owner: Any, name: str) -> Iterator[Wrapped]:
    """The wrappers that stand in the place of a method of this instance, the outermost first."""
    found = vars(owner).get(name) if hasattr(owner, "__dict__") else None
    while isinstance(found, Wrapped):
        yield found
        found = found.displaced


def own_methods(owner: Any) -> None:
    """Take off wrappers that a shallow copy shares with the instance that it was made from."""
    slots = vars(owner)
    for name in [name for name, value in slots.items() if isinstance(value, Wrapped)]:
        value = slots[name]
        if value.owner is owner:
            continue
        while isinstance(value, Wrapped):
            value = value.displaced
        if value is None:
            del slots[name]
        else:
            slots[name] = value


def _same(value: Any) -> Any:
    return value
