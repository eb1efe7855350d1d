"""How the transformer's blocks are divided into groups."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from numbers import Integral

from layercache.errors import StatsError
from layercache.stats import Group

Groups = int | str | Sequence[Group] | None
COUNT = 4
"""How many groups there are if nothing is said, where the model has so many blocks."""
_NUMBER = re.compile("[0-9]{1,9}")
_RANGE = re.compile(r"(\w+)\[({0}):({0})\]|({0}):({0})".replace("{0}", _NUMBER.pattern))


def auto_count(groups: Groups) -> int | None:
    """How many groups `"auto"` or `"auto:N"` asks for; None if it is not one of them.

    Raises:
        StatsError: N is no positive number.

    Example:
        >>> auto_count("auto"), auto_count("auto:6"), auto_count(4)
        (4, 6, None)
    """
    if not isinstance(groups, str) or groups.split(":")[0].strip() != "auto":
        return None
    _, colon, count = groups.partition(":")
    if not colon:
        return COUNT
    if not _NUMBER.fullmatch(count.strip()) or int(count) < 1:
        raise StatsError(f"groups is {groups!r}; write auto:N with a number of at least 1")
    return int(count)


def parse_groups(block_lists: Mapping[str, int], text: str) -> int | tuple[Group, ...]:
    """Groups as they are written on a command line: `4`, `blocks`, or boundaries.

    Boundaries are ranges of blocks, such as `transformer_blocks[0:4],transformer_blocks[4:28]`; the
    name of the list may be left out where the model has only one.

    Raises:
        StatsError: The text is none of these.

    Example:
        >>> [g.name for g in parse_groups({"blocks": 8}, "0:2,2:8")]
        ['blocks[0:2]', 'blocks[2:8]']
    """
    text = text.strip()
    if _NUMBER.fullmatch(text):
        return int(text)
    if text == "blocks":
        return sum(block_lists.values())
    found = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None or (not match[1] and len(block_lists) > 1):
            raise StatsError(
                f"groups is {text!r}; give a number, auto, auto:N, blocks, or ranges such as "
                + ",".join(f"{name}[0:{count}]" for name, count in block_lists.items())
            )
        name = match[1] or next(iter(block_lists))
        start, stop = int(match[2] or match[4]), int(match[3] or match[5])
        found.append(Group(block_list=name, start=start, stop=stop))
    return tuple(found)


def split_groups(block_lists: Mapping[str, int], groups: Groups) -> tuple[Group, ...]:
    """Contiguous groups that cover every block list.

    Args:
        block_lists: Blocks of each list, in execution order.
        groups: How many groups in all, shared among the lists in proportion to their length, each
            list getting at least one and none crossing from one list into another; 0 for none at
            all; or the groups themselves, in execution order, or written as for `parse_groups`; or
            None for `COUNT`, or as near to it as can be.

    Raises:
        StatsError: Fewer groups than lists, more than blocks, or groups that do not fit the lists.

    Example:
        >>> [g.name for g in split_groups({"blocks": 10}, 3)]
        ['blocks[0:3]', 'blocks[3:6]', 'blocks[6:10]']
    """
    total = sum(block_lists.values())
    if isinstance(groups, str):
        groups = parse_groups(block_lists, groups)
    if groups is None:
        groups = min(max(COUNT, len(block_lists)), total)
    if not isinstance(groups, Integral):
        if not isinstance(groups, list | tuple) or any(not isinstance(g, Group) for g in groups):
            raise StatsError(f"groups is {groups!r}; give a number, text, or a list of Group")
        return _checked(block_lists, tuple(groups))
    groups = int(groups)
    if groups == 0:
        return ()
    if not len(block_lists) <= groups <= total:
        raise StatsError(
            f"groups={groups}; this model has {len(block_lists)} block lists with {total} blocks "
            f"in all, so a number from {len(block_lists)} to {total} is needed, or 0 for plans of "
            "whole steps only"
        )
    counts = dict.fromkeys(block_lists, 1)
    for _ in range(groups - len(counts)):
        free = [name for name in counts if counts[name] < block_lists[name]]
        counts[max(free, key=lambda name: block_lists[name] / counts[name])] += 1
    result = []
    for name, count in counts.items():
        edges = [i * block_lists[name] // count for i in range(count + 1)]
        pairs = itertools.pairwise(edges)
        result += [Group(block_list=name, start=a, stop=b) for a, b in pairs]
    return tuple(result)


def _checked(block_lists: Mapping[str, int], groups: tuple[Group, ...]) -> tuple[Group, ...]:
    order = {name: index for index, name in enumerate(block_lists)}
    end = (-1, 0)
    for group in groups:
        if group.block_list not in order or group.stop > block_lists[group.block_list]:
            raise StatsError(
                f"group {group.name} is not in this model, whose block lists are "
                + ", ".join(f"{name}[0:{count}]" for name, count in block_lists.items())
            )
        start = (order[group.block_list], group.start)
        if start < end:
            raise StatsError(f"group {group.name} overlaps or precedes the group before it")
        end = (order[group.block_list], group.stop)
    if not groups:
        raise StatsError("groups is empty; name at least one")
    return groups
