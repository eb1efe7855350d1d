"""Where two descriptions of a calibration disagree, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def difference(mine: Mapping[str, Any], theirs: Mapping[str, Any], within: str = "") -> str:
    """The first field in which two mappings differ, with both values; empty if they agree.

    Example:
        >>> difference({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
        'b.c differs (2 and 3)'
    """
    for name in dict.fromkeys([*mine, *theirs]):
        one, other = mine.get(name), theirs.get(name)
        if one == other:
            continue
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            nested = difference(one, other, f"{within}{name}.")
            if nested:
                return nested
            # Nothing but entries of None against entries that are not there.
            continue
        if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
            index = next(i for i, item in enumerate(one) if item != other[i])
            return f"{within}{name}[{index}] differs ({one[index]!r} and {other[index]!r})"
        if isinstance(one, tuple) and isinstance(other, tuple):
            return f"the length of {within}{name} differs ({len(one)} and {len(other)})"
        return f"{within}{name} differs ({one!r} and {other!r})"
    return ""
