"""Introspection of a configuration's dataclasses: types, words for types, meanings, keys.

Both the walk that checks a file and the explanations use these functions.
"""

from __future__ import annotations

import difflib
import inspect
import re
import types
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from mptfoundry.config.engine.secrets import FromEnvironment


@cache
def field_types(cls: Any) -> dict[str, Any]:
    """The type of each field, in the class's order, including `Annotated`."""
    hints = get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in fields(cls)}


def members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union without None; any other type is its only member."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(m for arg in get_args(annotation) if arg is not type(None) for m in members(arg))
    return (annotation,)


def takes_none(annotation: Any) -> bool:
    """Whether null is one of the alternatives."""
    return type(None) in get_args(annotation)


def sections(annotation: Any) -> tuple[type, ...]:
    """The dataclasses among the alternatives, and those that the user's own code adds (`alternatives`)."""
    classes: list[type] = []
    for member in members(annotation):
        known: Any = get_args(member)[1] if get_origin(member) is Annotated else member
        if hasattr(known, "alternatives"):
            classes += known.alternatives()
        elif is_dataclass(member) and isinstance(member, type):
            classes.append(member)
    return tuple(classes)


def section_name(cls: type) -> str | None:
    """The value of `name` that selects this class, or None."""
    annotation = field_types(cls).get("name")
    choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    return choices[0] if len(choices) == 1 else None


def default_of(field: Field[Any]) -> Any:
    """A field's default; MISSING for a required field."""
    return field.default_factory() if field.default_factory is not MISSING else field.default


@cache
def meanings(cls: Any) -> dict[str, str]:
    """Each field's meaning, from the `Attributes:` sections of the class and its bases."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        lines = inspect.cleandoc(base.__doc__ or "").split("\n")
        if "Attributes:" not in lines:
            continue
        name = ""
        for line in lines[lines.index("Attributes:") + 1 :]:
            start = re.fullmatch(r"    (\w+): (.+)", line)
            if start:
                name = start[1]
                texts[name] = start[2]
            elif line.startswith("     ") and name:
                texts[name] += " " + line.strip()
            else:
                name = ""
    return texts


def subject(cls: type) -> str:
    """The first sentence of a class's docstring."""
    return inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].replace("\n", " ")


def show(value: Any) -> str:
    """A value as in YAML; text in quotes, sections and long lists abbreviated."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, FromEnvironment):
        return value.expression
    if isinstance(value, str):
        return f"'{value}'" if len(value) <= 60 else f"'{value[:57]}...'"
    if isinstance(value, dict):
        return "{}" if not value else "a section"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(show(v) for v in value) + "]" if len(value) <= 8 else "a list"
    return str(value)


def did_you_mean(word: Any, options: Iterable[str]) -> str:
    """The option with the closest spelling, as a sentence after a space, or an empty text."""
    near = difflib.get_close_matches(str(word), list(options), 1)
    return f" Did you mean {near[0]}?" if near else ""


def choice(value: Any) -> str:
    """One choice of a Literal, as in YAML."""
    return value if isinstance(value, str) else show(value)


def describe(annotation: Any) -> str:
    """A type in words: `a whole number, or auto`."""
    said: list[str] = []
    for member in members(annotation):
        has_said_section = any(word.startswith("a section with name: ") for word in said)
        if has_said_section and is_dataclass(member) and (name := section_name(cast(type, member))):
            said.append(name)
            continue
        said += [choice(v) for v in choices_of(member)] or [_describe_member(member)]
    said += ["null"] if takes_none(annotation) else []
    words = [word for word in dict.fromkeys(said) if word]
    return " or ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} or {words[-1]}"


def choices_of(member: Any) -> tuple[Any, ...]:
    """The values that a member of a union lists: those of a Literal, or names of the user's own."""
    if get_origin(member) is Literal:
        return get_args(member)
    return tuple(member.own_names()) if hasattr(member, "own_names") else ()


def _describe_member(member: Any) -> str:
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if member in plain:
        return plain[member]
    if hasattr(member, "own_names"):
        return ""
    if member is Any:
        return "anything"
    if is_dataclass(member) and isinstance(member, type):
        name = section_name(member)
        return f"a section with name: {name}" if name else "a section"
    arguments = get_args(member)
    kind = get_origin(member)
    if kind is Annotated:
        return arguments[1].words
    if kind is tuple and arguments[-1] is Ellipsis:
        return f"a list, each {describe(arguments[0])}"
    if kind is tuple:
        return f"a list of {len(arguments)} entries, each {describe(arguments[0])}"
    if kind is list:
        return "a list"
    if kind is dict or member is dict:
        return "a section of names"
    return str(member)


def walk_keys(cls: type, path: str = "", depth: int = 8) -> Iterator[tuple[str, type, str]]:
    """All keys below a class: dotted path, the class that has the key, the key's name in that class.

    `*` is a name that the user chooses, `[N]` an index. If classes share a section, each yields its own keys.
    """
    for name, annotation in field_types(cls).items():
        here = f"{path}.{name}" if path else name
        yield here, cls, name
        for below, mark in _below(annotation):
            if depth:
                yield from walk_keys(below, here + mark, depth - 1)


def _below(annotation: Any) -> Iterator[tuple[type, str]]:
    for member in members(annotation):
        arguments = get_args(member)
        if is_dataclass(member) and isinstance(member, type):
            yield member, ""
        elif get_origin(member) is tuple:
            for below, mark in _below(arguments[0]):
                yield below, "[N]" + mark
        elif get_origin(member) is dict:
            for below, mark in _below(arguments[1]):
                yield below, ".*" + mark
