"""The one walk that turns a document into a dataclass and finds everything that is wrong with it.

Types come from the dataclasses' annotations: `Literal` lists choices, a union of dataclasses is chosen from
by `name`, `Annotated[..., Form]` checks the form of a text. Objects are built from the leaves up. A problem
never ends the walk; whatever has one is INVALID, and what stands above it is checked as far as it can be.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from mptfoundry.config.engine.document import UNRESOLVED, Document, KeyPath, Origin, parse_key
from mptfoundry.config.engine.forms import Form
from mptfoundry.config.engine.schema import (
    choice,
    default_of,
    describe,
    did_you_mean,
    field_types,
    meanings,
    members,
    section_name,
    sections,
    show,
    takes_none,
    walk_keys,
)
from mptfoundry.config.engine.secrets import FromEnvironment
from mptfoundry.config.engine.signatures import Catalogue

INVALID: Any = object()
Refused = Mapping[tuple[str, str], str]
T = TypeVar("T")
_KEYS_IN_AN_ERROR = 30


class _MismatchError(Exception):
    """A value is not of this member of its type; another may take it."""


def build(schema: type[T], document: Document, refused: Refused | None = None) -> T:
    """Build `schema` from the document.

    Args:
        schema: The dataclass. One with a static method `rules(values)` gets its valid fields before it is
            built, and yields the problems between them as (dotted key, text).
        document: What was written.
        refused: What is known but not supported, and why: (class name, key), (top section, its `name`) or
            (key, value).

    Raises:
        ConfigError: All problems of the document, each with its place.
    """
    result = _Walk(schema, document, refused or {}).section(schema, document.tree, ())
    document.raise_problems()
    return result


class _Walk:
    """The state of the walk: where problems go, and what is known but not supported."""

    def __init__(self, root: type, document: Document, refused: Refused) -> None:
        self.root = root
        self.document = document
        self.refused = refused

    def value(self, annotation: Any, value: Any, path: KeyPath) -> Any:
        """The value at `path` as its type wants it, or INVALID."""
        if value is UNRESOLVED:
            return INVALID
        if value is None and takes_none(annotation):
            return None
        classes = sections(annotation)
        if classes and value is None:
            value = {}
        if classes and isinstance(value, dict):
            return self.chosen(classes, value, path)
        try:
            return self.first_that_takes(annotation, value, path)
        except _MismatchError:
            self.document.report(path, self.mismatch(annotation, value, path))
            return INVALID

    def first_that_takes(self, annotation: Any, value: Any, path: KeyPath) -> Any:
        """The value as the first member of its type takes it; raises _MismatchError if none does."""
        for member in members(annotation):
            try:
                return self.member(member, value, path)
            except _MismatchError:
                continue
        raise _MismatchError

    def chosen(self, classes: tuple[type, ...], value: dict[str, Any], path: KeyPath) -> Any:
        """The section of the class that `name` chooses; a misspelled name still has its keys checked.

        Without a name it is the one class whose `name` has a default, if there is one.
        """
        by_name = {str(section_name(cls)): cls for cls in classes}
        name: Any = value.get("name")
        usual = classes if len(classes) == 1 else [cls for cls in classes if _has_usual_name(cls)]
        if len(usual) == 1 and (name is None or section_name(usual[0]) is None):
            return self.section(usual[0], value, path)
        if isinstance(name, str) and name in by_name:
            return self.section(by_name[name], value, path)
        if name is UNRESOLVED:
            return INVALID
        if "name" in value and not isinstance(name, str):
            expected = f"Expected {' or '.join(by_name)}."
            text = "has no value" if name is None else f"{show(name)} is not allowed here"
            self.document.report((*path, "name"), f"{text}. {expected}")
            return INVALID
        allowed = f"Allowed: {', '.join(by_name)}."
        reason = self.refused.get((str(path[0]), str(name)))
        if "name" not in value:
            self.document.report(path, f"name is missing. {allowed}")
        elif reason:
            self.document.report((*path, "name"), f"{show(name)} is not supported: {reason}")
        else:
            self.document.report(
                (*path, "name"), f"{show(name)} is not known.{did_you_mean(name, by_name)} {allowed}"
            )
            for near in difflib.get_close_matches(str(name), by_name, 1):
                self.section(by_name[near], {**value, "name": near}, path)
        return INVALID

    def section(self, cls: type, value: dict[str, Any], path: KeyPath) -> Any:
        """A dataclass from its section, or INVALID."""
        types = field_types(cls)
        for key in value:
            if key not in types:
                self.document.report((*path, key), self.unknown_key(cls, (*path, key)))
        valid, invalid = {}, set()
        for field in fields(cls):
            if field.name in value:
                result = self.value(types[field.name], value[field.name], (*path, field.name))
                if result is INVALID:
                    invalid.add(field.name)
                else:
                    valid[field.name] = result
            elif default_of(field) is MISSING:
                invalid.add(field.name)
                text = (
                    f"is missing. Expected {describe(types[field.name])}. {meanings(cls).get(field.name, '')}"
                )
                self.document.report((*path, field.name), text.rstrip())
        return self.construct(cls, valid, invalid, path)

    def construct(self, cls: type, valid: dict[str, Any], invalid: set[str], path: KeyPath) -> Any:
        """Build the class, or find what its rules say about the valid fields.

        A class raises at its first broken rule. To find the others, the field that broke it is set back to
        its default and the class is built again; rules that speak of such fields no longer count.
        """
        if hasattr(cls, "rules"):
            defaults = {f.name: default_of(f) for f in fields(cls) if f.name not in invalid}
            problems = list(cls.rules({**defaults, **valid}))
            for key, text in problems:
                self.document.report((*path, *parse_key(key)), text)
            return INVALID if problems or invalid else cls(**valid)
        has_default = {f.name: default_of(f) is not MISSING for f in fields(cls)}
        suspects, given = set(invalid), dict(valid)
        while all(has_default[name] for name in invalid):
            try:
                built = cls(**given)
            except ValueError as error:
                spoken_of = _fields_in(str(error), has_default)
                if not suspects.intersection(spoken_of):
                    self.broken_rule(str(error), spoken_of, path)
                culprit = next((name for name in spoken_of if name in given and has_default[name]), None)
                if culprit is None:
                    return INVALID
                suspects.add(culprit)
                del given[culprit]
            else:
                return INVALID if suspects else built
        return INVALID

    def broken_rule(self, text: str, spoken_of: list[str], path: KeyPath) -> None:
        """Report the ValueError of a class; one that begins with `key: ` belongs to that key."""
        written = [name for name in spoken_of if self.document.get((*path, name)) is not None]
        start = re.match(r"([A-Za-z_][\w.\[\]]*): ", text)
        if start and spoken_of and parse_key(start[1])[0] == spoken_of[0]:
            key = (*path, *parse_key(start[1]))
            text = text[start.end() :]
        else:
            key = path
        is_written = self.document.get(key) is not None and key != path
        self.document.report(key, text, at=None if is_written or not written else (*path, written[0]))

    def member(self, member: Any, value: Any, path: KeyPath) -> Any:
        """The value as one member of a union takes it; raises _MismatchError if it doesn't."""
        kind, arguments = get_origin(member), get_args(member)
        if is_dataclass(member):
            raise _MismatchError
        if kind is Annotated:
            return self.annotated(arguments[0], arguments[1], value, path)
        if kind is Literal:
            if isinstance(value, bool):  # YAML reads an unquoted off or on as one
                value = next(
                    (each for each in arguments if each == self.document.origin(path).written), value
                )
            for option in arguments:
                kind_of_value = str if isinstance(value, str) else type(value)
                if type(option) is kind_of_value and option == value:
                    return option
            raise _MismatchError
        if kind is tuple:
            return self.sequence(arguments, value, path)
        if kind is dict or member is dict:
            return self.mapping(arguments[1] if arguments else Any, value, path)
        if member is str:
            return self.text(value, path)
        if member is Any:
            return INVALID if _has_unresolved(value) else value
        return _number(member, value)

    def annotated(self, plain: Any, form: Form | Catalogue, value: Any, path: KeyPath) -> Any:
        """A value whose form is checked after its plain type."""
        if isinstance(form, Catalogue):
            return self.foreign(form, value, path)
        result = self.first_that_takes(plain, value, path)
        try:
            form.check(result)
        except ValueError as error:
            self.document.report(path, str(error))
            return INVALID
        return result

    def foreign(self, form: Catalogue, value: Any, path: KeyPath) -> Any:
        """A section of other people's classes by name; one given as null on the command line is left out."""
        if not isinstance(value, (dict, type(None))):
            raise _MismatchError
        given = value or {}
        self.nothing_to_leave_out(given, path, form.known)
        kept = {
            name: kwargs
            for name, kwargs in given.items()
            if kwargs is not None or not self.document.origin((*path, name)).is_word
        }
        if _has_unresolved(kept):
            return INVALID
        problems = list(form.problems(kept))
        for below, text in problems:
            self.document.report((*path, *below), text)
        return INVALID if problems else kept

    def sequence(self, arguments: tuple[Any, ...], value: Any, path: KeyPath) -> Any:
        """A tuple from a list; one text alone is a list of one."""
        if value is None and arguments[-1] is Ellipsis:
            return ()
        if arguments[0] is str and not isinstance(value, (list, type(None))):
            value = [self.text(value, path)]
        if not isinstance(value, list):
            raise _MismatchError
        is_open = arguments[-1] is Ellipsis
        if not is_open and len(value) != len(arguments):
            raise _MismatchError
        items = [self.value(arguments[0], item, (*path, index)) for index, item in enumerate(value)]
        return INVALID if any(item is INVALID for item in items) else tuple(items)

    def mapping(self, annotation: Any, value: Any, path: KeyPath) -> Any:
        """A dict with names that the user chooses; a section given as null is left out."""
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise _MismatchError
        if sections(annotation):
            self.nothing_to_leave_out(value, path, [name for name, item in value.items() if item is not None])
            value = {name: item for name, item in value.items() if item is not None}
        items = {name: self.value(annotation, item, (*path, name)) for name, item in value.items()}
        return INVALID if any(item is INVALID for item in items.values()) else items

    def nothing_to_leave_out(self, value: dict[str, Any], path: KeyPath, names: Iterable[str]) -> None:
        """Report words such as `callbacks.x=null` for a name that nothing has."""
        for name, item in value.items():
            if item is None and (*path, name) in self.document.absent and name not in names:
                text = f"there is nothing of this name to leave out.{did_you_mean(name, names)}"
                self.document.report((*path, name), text)

    def text(self, value: Any, path: KeyPath) -> str:
        """A text. A number is taken as it was written; so is a word of the command line, unless quoted."""
        origin = self.document.origin(path)
        if _is_a_list_or_mapping(value, origin):
            raise _MismatchError
        if origin.is_word and origin.written and origin.expression is None and value is not None:
            is_quoted = isinstance(value, str) and origin.written[0] in "\"'"
            return value if is_quoted else origin.written
        if isinstance(value, str):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return origin.written or str(value)
        raise _MismatchError

    def mismatch(self, annotation: Any, value: Any, path: KeyPath) -> str:
        """Why a value does not fit its type, and what would."""
        origin = self.document.origin(path)
        is_shown = isinstance(value, FromEnvironment)
        source = f" (from {origin.expression})" if origin.expression and not is_shown else ""
        expected = f"Expected {describe(annotation)}."
        if value is None:
            return f"has no value{source}. {expected}"
        hint = ""
        if (str(path[-1]), str(value)) in self.refused:
            return f"{show(value)} is not supported: {self.refused[str(path[-1]), str(value)]} {expected}"
        if isinstance(value, str):
            options = [
                option for m in members(annotation) for option in get_args(m) if get_origin(m) is Literal
            ]
            hint = did_you_mean(value, [choice(option) for option in options])
            if isinstance(value, FromEnvironment) and _fits_unquoted(annotation, value):
                hint = f" Write ${{oc.decode:{origin.expression}}}."
            elif not source and _fits_unquoted(annotation, value):
                hint = " Write it without quotes."
        if str in members(annotation) and _is_a_list_or_mapping(value, origin):
            hint = " Put it in quotes if it is text."
        return f"{show(value)}{source} is not allowed here.{hint} {expected}"

    def unknown_key(self, cls: type, path: KeyPath) -> str:
        """Why the key at the end of a path is not allowed in a class, and which one was meant."""
        key = str(path[-1])
        if (cls.__name__, key) in self.refused:
            return f"is not supported: {self.refused[cls.__name__, key]}"
        names = list(field_types(cls))
        near = did_you_mean(key, names)
        if near:
            return f"unknown key.{near}"
        elsewhere = [path for path, _, name in walk_keys(self.root) if name == key]
        if ".".join(map(str, path)) in elsewhere:
            return f"unknown key here. It belongs to another `name` of {path[0]}."
        if elsewhere:
            return f"unknown key here. It belongs at {' or '.join(dict.fromkeys(elsewhere[:2]))}."
        if len(names) <= _KEYS_IN_AN_ERROR:
            return f"unknown key. Allowed here: {', '.join(names)}."
        return "unknown key. `mptfoundry explain` lists all keys."


def _has_usual_name(cls: type) -> bool:
    return all(default_of(field) is not MISSING for field in fields(cls) if field.name == "name")


def _fields_in(text: str, names: Mapping[str, bool]) -> list[str]:
    """The fields that a text speaks of, in its order."""
    return [word for word in dict.fromkeys(re.findall(r"[A-Za-z_]\w*", text)) if word in names]


def _has_unresolved(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_unresolved(item) for item in value.values())
    if isinstance(value, list):
        return any(_has_unresolved(item) for item in value)
    return value is UNRESOLVED


def _number(member: Any, value: Any) -> Any:
    """An int, a float or a bool; whole floats are ints, ints are floats, texts are neither."""
    if member is bool and isinstance(value, bool):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _MismatchError
    if member is int and isinstance(value, int):
        return value
    try:
        value = float(value)
    except OverflowError:
        raise _MismatchError from None
    if member is float and math.isfinite(value):
        return value
    if member is int and math.isfinite(value) and value == int(value):
        return int(value)
    raise _MismatchError


def _is_a_list_or_mapping(value: Any, origin: Origin) -> bool:
    """Whether a word is written as one, such as `[a]` or `{a: b}`; `{a}` and `note: b` may be text."""
    if not origin.is_word or (origin.written or "")[:1] not in ("[", "{"):
        return False
    return isinstance(value, list) or (
        isinstance(value, dict) and any(item is not None for item in value.values())
    )


def _fits_unquoted(annotation: Any, value: str) -> bool:
    if bool in members(annotation) and value.strip().lower() in ("true", "false"):
        return True
    try:
        number = float(value)
    except ValueError:
        return False
    return math.isfinite(number) and any(
        member is float or (member is int and number % 1 == 0) or number in get_args(member)
        for member in members(annotation)
    )
