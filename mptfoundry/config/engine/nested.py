"""Nested plain values: dicts and lists within one another, and a path of keys and indices to each value."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Path = tuple[Any, ...]


def leaves(value: Any, path: Path = (), *, lists: bool = True) -> Iterator[tuple[Path, Any]]:
    """Yield the path and the value of everything that holds nothing else; an empty dict or list is one.

    Args:
        value: Dicts, lists and plain values.
        path: The path of `value` itself.
        lists: Look into lists; otherwise a list is a value, too.
    """
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif lists and isinstance(value, (list, tuple)):
        items = enumerate(value)
    if not items or not value:
        yield path, value
        return
    for key, item in items:
        yield from leaves(item, (*path, key), lists=lists)


def mapped(value: Any, change: Callable[[Any, Path], Any], path: Path = ()) -> Any:
    """The same dicts and lists, with `change(value, path)` in place of each value; tuples become lists."""
    if isinstance(value, Mapping):
        return {key: mapped(item, change, (*path, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [mapped(item, change, (*path, index)) for index, item in enumerate(value)]
    return change(value, path)
