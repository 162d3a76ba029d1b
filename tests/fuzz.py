"""Damaged inputs, the same for the same seed: bytes with a few changes, and nested values with one."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

# What a hand-written or damaged file may hold where something else belongs.
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    10**30,
    -0.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../x",
    "\x00",
    "9" * 5000,
    [],
    [[]],
    {},
    {"a": None},
)


def damaged_bytes(data: bytes, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Yields `count` pairs of what was done and the damaged bytes."""
    draw = random.Random(seed)
    for number in range(count):
        at = draw.randrange(len(data))
        length = draw.choice((1, 8, 64))
        kind = draw.choice(("flip", "cut", "zero", "insert", "repeat", "drop"))
        if kind == "flip":
            changed = data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
        elif kind == "cut":
            changed = data[:at]
        elif kind == "zero":
            changed = data[:at] + bytes(len(data[at : at + length])) + data[at + length :]
        elif kind == "insert":
            changed = data[:at] + draw.randbytes(length) + data[at:]
        elif kind == "repeat":
            changed = data[: at + length] + data[at:]
        else:
            changed = data[:at] + data[at + length :]
        yield f"{number}: {kind} at byte {at} of {len(data)}", changed


def odd_values(value: Any, seed: int, count: int) -> Iterator[tuple[str, Any]]:
    """Yields `count` pairs of what was done and a copy of the nested `value` with one entry replaced by an
    odd value, removed or renamed."""
    draw = random.Random(seed)
    places = list(_places(value, ()))
    for number in range(count):
        path = draw.choice(places)
        changed = copy.deepcopy(value)
        holder = changed
        for key in path[:-1]:
            holder = holder[key]
        kind = draw.choice(("replace", "replace", "replace", "remove", "rename"))
        said = ".".join(map(str, path))
        if kind == "rename" and isinstance(holder, dict):
            holder[f"{path[-1]}x"] = holder.pop(path[-1])
        elif kind == "remove":
            del holder[path[-1]]
        else:
            kind, odd = "replace", copy.deepcopy(draw.choice(ODD_VALUES))
            holder[path[-1]] = odd
            said = f"{said} by {str(odd)[:20]!r}"
        yield f"{number}: {kind} {said}", changed


def _places(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, item in entries:
        yield (*path, key)
        yield from _places(item, (*path, key))
