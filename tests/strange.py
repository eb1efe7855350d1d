"""Hypothesis strategies of what no file should hold: strange values, mutations of good ones."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

from hypothesis import strategies as st

SURROGATE = "\ud800"
NUMBERS = (
    0, -0.0, -1, 1, 2**31, 2**53 + 1, 2**63, -(2**63) - 1, 10**400, 1e-320, 1e308, -1e308, 0.1,
    math.inf, -math.inf, math.nan,
)  # fmt: skip
TEXTS = ("", " ", "#", "\x00", "\n", "é", "\U0001f600", SURROGATE, f"a{SURROGATE}b", "x" * 5000)


def deep(levels: int, inside: Any = 0) -> Any:
    """`inside` within so many lists and objects."""
    for level in range(levels):
        inside = [inside] if level % 2 else {"a": inside}
    return inside


values = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXTS),
    st.text(st.characters(), max_size=4),
    st.sampled_from((10, 40, 900)).map(deep),
    st.just([]),
    st.just({}),
    st.lists(st.sampled_from(NUMBERS), max_size=4),
    st.dictionaries(st.sampled_from(TEXTS[:8]), st.sampled_from(NUMBERS), max_size=2),
)
"""Any JSON value, and some that Python's `json` writes although they are none."""


def places(value: Any) -> list[tuple[Any, ...]]:
    """The paths of all entries of nested lists and dictionaries."""
    entries = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    found: list[tuple[Any, ...]] = []
    for name, item in list(entries):
        found += [(name,), *((name, *rest) for rest in places(item))]
    return found


@st.composite
def mutated(draw: st.DrawFn, good: Any) -> Any:
    """A copy of nested values with one to three entries replaced, removed, renamed or repeated."""
    value = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        paths = places(value)
        if not paths:
            return draw(values)
        *above, last = draw(st.sampled_from(paths))
        holder = value
        for name in above:
            holder = holder[name]
        what = draw(st.sampled_from(("replace", "replace", "nudge", "remove", "repeat", "swap")))
        item = holder[last]
        if what == "nudge" and isinstance(item, int | float) and not isinstance(item, bool):
            holder[last] = draw(st.sampled_from((item + 1, item - 1, -item, item * 2, float(item))))
        elif what == "nudge" and isinstance(item, str) and item:
            at = draw(st.integers(0, len(item) - 1))
            holder[last] = item[:at] + draw(st.sampled_from(("#", ".", "0", "9", "z", "é", "")))
            holder[last] += item[at + 1 :]
        elif what == "remove":
            del holder[last]
        elif what == "repeat" and isinstance(holder, list):
            holder.insert(last, copy.deepcopy(item))
        elif what == "repeat":
            holder[draw(st.sampled_from(TEXTS))] = copy.deepcopy(item)
        elif what == "swap":
            holder[last] = [item] if draw(st.booleans()) else {"a": item}
        else:
            holder[last] = draw(values)
    return value


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """Bytes with one to four of them flipped, cut out, put in or cut off."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        at = draw(st.integers(0, len(data) - 1))
        what = draw(st.sampled_from(("flip", "flip", "cut", "insert", "end")))
        if what == "flip":
            data[at] ^= draw(st.integers(1, 255))
        elif what == "cut":
            del data[at : at + draw(st.integers(1, 40))]
        elif what == "insert":
            piece = draw(
                st.sampled_from((b"\x00", b'"', b"{", b"[", b"9" * 30, b"NaN", b"\\ud800"))
            )
            data[at:at] = piece
        else:
            del data[at:]
    return bytes(data)


@st.composite
def texts_of(draw: st.DrawFn, good: dict[str, Any]) -> bytes:
    """A JSON file: of mutated values, with a key that stands twice, or with damaged bytes."""
    kind = draw(st.sampled_from(("values", "values", "twice", "bytes", "encoding")))
    if kind == "values":
        return json.dumps(draw(mutated(good))).encode()
    text = json.dumps(good)
    if kind == "twice":
        name = draw(st.sampled_from(sorted(good)))
        return f'{{"{name}": {json.dumps(draw(values))}, {text[1:]}'.encode()
    if kind == "encoding":
        return text.encode(draw(st.sampled_from(("utf-16", "utf-32", "utf-8-sig", "latin-1"))))
    return draw(damaged(text.encode()))
