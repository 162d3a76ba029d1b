"""Nested dicts and lists, where a path of keys and indices leads to each value."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Path = tuple[Any, ...]


def leaves(value: Any, path: Path = (), *, lists: bool = True) -> Iterator[tuple[Path, Any]]:
    """Yield the path and value of each leaf: an empty dict or list is one, and without `lists` any list."""
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
    """The same dicts and lists with each value replaced by `change(value, path)`; tuples become lists."""
    if isinstance(value, Mapping):
        return {key: mapped(item, change, (*path, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [mapped(item, change, (*path, index)) for index, item in enumerate(value)]
    return change(value, path)
