"""The rules of a section: plain generators that yield a key below the section and a message.

A section's `rules` yields one generator per rule. One pass finds all problems: the rules run on a view of the
section, and a rule stops when it reads a missing or invalid field.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from operator import attrgetter
from typing import Any

from mptfoundry.config.engine.schema import field_types
from mptfoundry.mpt.config import Limits, Problem, Rules, Section, in_words, only_one

__all__ = ["Limits", "Problem", "Rules", "Section", "broken_rules", "in_words", "not_empty", "only_one"]
__all__ += ["where_set"]


class _NoValueError(Exception):
    """A rule read a missing or invalid field."""


class _View:
    """A section before it is built: its valid fields, with the properties and methods of its class."""

    def __init__(self, cls: type, values: Mapping[str, Any]) -> None:
        self._cls = cls
        self._values = dict(values)
        self._asked: set[str] = set()

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # `super()` and `isinstance` treat the view as the section
        return self._cls

    def __getattr__(self, name: str) -> Any:
        if name in field_types(self._cls):
            self._asked.add(name)
            if name not in self._values:
                raise _NoValueError
            return self._values[name]
        attribute = inspect.getattr_static(self._cls, name)
        return attribute.__get__(self, self._cls) if hasattr(attribute, "__get__") else attribute


def broken_rules(cls: Any, values: Mapping[str, Any]) -> Iterator[Problem]:
    """All problems of a section whose valid fields are `values`.

    If a field breaks a rule that reads no other field, it counts as invalid for the following rules.
    """
    view = _View(cls, values)
    for rule in cls.all_rules(view):
        view._asked.clear()
        problems: list[Problem] = []
        with suppress(_NoValueError):
            problems += rule
        if problems and len(view._asked) == 1:
            view._values.pop(*view._asked)
        yield from problems


def where_set(section: Any, key: str, rule: Callable[[Any], Iterator[Problem]]) -> Iterator[Problem]:
    """A rule that holds only where the option `key`, such as `model.peft_config`, is set; 0 counts as set."""
    value = attrgetter(key)(section)
    if value or (value == 0 and value is not False):
        yield from rule(section)


def not_empty(section: Any, name: str) -> Iterator[Problem]:
    """A name is not blank."""
    value = getattr(section, name)
    if isinstance(value, str) and not value.strip():
        yield name, "is empty. Give a name, or remove it."


def picture_format(section: Section) -> Iterator[Problem]:
    """The problem of a section's `picture`, if its name does not say a format that can be drawn."""
    name = getattr(section, "picture", None)
    if name is not None and not name.endswith((".png", ".pdf", ".svg")):
        yield "picture", f"{name} is not a picture. Use a name that ends in .png."
