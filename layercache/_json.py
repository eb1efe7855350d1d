"""JSON as plan and statistics files hold it: what one machine writes, every other reads the same.

JSON leaves open what half of its readers do with numbers out of range, repeated keys and lone
surrogates. None of them can stand in a file of LayerCache, so none is read or written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 32
"""Levels of nesting. Files of LayerCache have five or six."""
_MAX_INTEGER = 2**63


def parse(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: It is no JSON, names a key twice, nests deeper than `MAX_DEPTH`, or holds NaN,
            infinity, an integer beyond 64 bits or text that is no Unicode.

    Example:
        >>> parse('{"steps": [1, 2]}')
        {'steps': [1, 2]}
    """
    try:
        value = json.loads(text, parse_constant=_no_number, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError(f"it nests deeper than {MAX_DEPTH} levels") from None
    require_plain(value)
    return value


def require_plain(value: Any, path: str = "", depth: int = 0) -> None:
    """Refuse a value that `parse` would not give back equal (but for tuples, which become lists).

    Args:
        value: Nested mappings, sequences, text, numbers, booleans and None.
        path: Where the value stands, for the message.
        depth: Levels above it.

    Raises:
        ValueError: The message names the place.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"it nests deeper than {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        for name, item in value.items():
            if not isinstance(name, str):
                raise ValueError(f"{path or 'it'} has the key {name!r}; keys are text")
            _require_text(name, path)
            require_plain(item, f"{path}.{name}" if path else name, depth + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            require_plain(item, f"{path}[{index}]", depth + 1)
    elif isinstance(value, str):
        _require_text(value, path)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{path or 'it'} is {value}, not a finite number")
    elif isinstance(value, int):
        if not -_MAX_INTEGER <= value < _MAX_INTEGER:
            raise ValueError(f"{path or 'it'} is an integer of more than 64 bits")
    elif value is not None:
        raise ValueError(f"{path or 'it'} is a {type(value).__name__}, which is no JSON value")


def _require_text(text: str, path: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{path or 'it'} holds {ascii(text)[:80]}, which is no Unicode") from None


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!a} stands twice")
    return found
