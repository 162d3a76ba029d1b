"""Build a dataclass from a document in one walk, and find all its problems.

Types come from the dataclasses' annotations: `Literal` lists choices, `name` selects from a union of
dataclasses, `Annotated[..., Form]` checks the format of a text. Objects are built from the leaves up. A
problem never ends the walk: the value becomes INVALID, and its section is still checked as far as possible.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from mptfoundry.config.engine.document import UNRESOLVED, Document, KeyPath, Origin, parse_key
from mptfoundry.config.engine.forms import Form
from mptfoundry.config.engine.nested import leaves
from mptfoundry.config.engine.schema import (
    choice,
    choices_of,
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
from mptfoundry.config.engine.section_rules import broken_rules, in_words
from mptfoundry.config.engine.signatures import Catalogue, OfSignature

INVALID: Any = object()
Refused = Mapping[tuple[str, str], str]
T = TypeVar("T")
_KEYS_IN_AN_ERROR = 30


class _MismatchError(Exception):
    """A value does not fit this member of a union; another member may accept it."""


def build(schema: type[T], document: Document, refused: Refused | None = None) -> T:
    """Build the dataclass `schema` from the document.

    `refused` has known but unsupported options, and why: (class name, key), (top section, its `name`) or
    (key, value).

    Raises:
        ConfigError: All problems of the document, each with its place.
    """
    result = _Walk(schema, document, refused or {}).section(schema, document.tree, ())
    document.raise_problems()
    return result


class _Walk:
    """The state of the walk: the document that collects problems, and the refused options."""

    def __init__(self, root: type, document: Document, refused: Refused) -> None:
        self.root = root
        self.document = document
        self.refused = refused

    def value(self, annotation: Any, value: Any, path: KeyPath) -> Any:
        """The value at `path`, converted to its type, or INVALID."""
        if value is UNRESOLVED:
            return INVALID
        if value is None and takes_none(annotation):
            return None
        classes = sections(annotation)
        if classes and value is None:
            value = {}
        if classes and self.document.has_unknown_names and isinstance(value, dict):
            classes += _unchecked(annotation, value, classes)
        if classes and isinstance(value, dict):
            return self.chosen(classes, value, path)
        try:
            return self.first_that_takes(annotation, value, path)
        except _MismatchError:
            self.document.report(path, self.mismatch(annotation, value, path))
            return INVALID

    def first_that_takes(self, annotation: Any, value: Any, path: KeyPath) -> Any:
        """The value converted by the first member of its type that fits; _MismatchError if none does."""
        for member in members(annotation):
            try:
                return self.member(member, value, path)
            except _MismatchError:
                continue
        raise _MismatchError

    def chosen(self, classes: tuple[type, ...], value: dict[str, Any], path: KeyPath) -> Any:
        """The section of the class that `name` selects.

        Without a name, it is the only class whose `name` has a default, if there is one.
        """
        by_name = {str(section_name(cls)): cls for cls in classes}
        name: Any = value.get("name")
        usual = classes if len(classes) == 1 else [cls for cls in classes if _has_usual_name(cls)]
        if len(usual) == 1 and (name is None or section_name(usual[0]) is None):
            return self.section(usual[0], value, path)
        if isinstance(name, str) and name in by_name:
            return self.section(by_name[name], value, path)
        if name is not UNRESOLVED:
            self.unknown_name(by_name, value, path)
        return INVALID

    def unknown_name(self, by_name: dict[str, type], value: dict[str, Any], path: KeyPath) -> None:
        """Report an unknown `name`; if it looks misspelled, also check its keys."""
        name, allowed = value.get("name"), f"Allowed: {', '.join(by_name)}."
        reason = self.refused.get((str(path[0]), str(name)))
        if "name" not in value:
            self.document.report(path, f"name is missing. {allowed}")
        elif not isinstance(name, str):
            text = "has no value" if name is None else f"{show(name)} is not allowed here"
            self.document.report((*path, "name"), f"{text}. Expected {' or '.join(by_name)}.")
        elif reason:
            self.document.report((*path, "name"), f"{show(name)} is not supported: {reason}")
        else:
            text = f"{show(name)} is not known.{did_you_mean(name, by_name)} {allowed}"
            self.document.report((*path, "name"), text)
            for near in difflib.get_close_matches(name, by_name, 1):
                self.section(by_name[near], {**value, "name": near}, path)

    def section(self, cls: type, value: dict[str, Any], path: KeyPath) -> Any:
        """The dataclass built from its section, or INVALID."""
        types = field_types(cls)
        for key in value:
            is_own = self.document.has_unknown_names and hasattr(cls, "alternatives")
            if key not in types and not is_own:
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
                self.missing_key(cls, (*path, field.name))
        if not invalid:
            with suppress(ValueError):
                return cls(**valid)
        defaults = {f.name: default_of(f) for f in fields(cls) if f.name not in invalid}
        self.broken_rules(cls, defaults | valid, path)
        return INVALID

    def missing_key(self, cls: type, path: KeyPath) -> None:
        """Report a missing required key."""
        key = str(path[-1])
        text = f"is missing. Expected {describe(field_types(cls)[key])}. {meanings(cls).get(key, '')}"
        self.document.report(path, text.rstrip())

    def broken_rules(self, cls: type, valid: dict[str, Any], path: KeyPath) -> None:
        """Report all rules that the valid fields break."""
        for key, text in broken_rules(cls, valid):
            if isinstance(key, tuple):
                self.document.report(path, in_words(key, text), at=(*path, key[0]))
            else:
                self.document.report((*path, *parse_key(key)), text)

    def member(self, member: Any, value: Any, path: KeyPath) -> Any:
        """The value converted to one member of a union; raises _MismatchError if it doesn't fit."""
        kind, arguments = get_origin(member), get_args(member)
        if is_dataclass(member):
            raise _MismatchError
        if kind is Annotated:
            return self.annotated(arguments[0], arguments[1], value, path)
        if kind is Literal:
            if isinstance(value, bool):  # YAML reads an unquoted off or on as a bool
                value = self.as_written(arguments, value, path)
            for option in arguments:
                if option == value and type(option) in (str, type(value)):
                    return option
            raise _MismatchError
        if hasattr(member, "own_names"):
            return self.own_name(member, value)
        if kind is tuple:
            return self.sequence(arguments, value, path)
        if kind is list:
            return self.items(arguments[0], value, path)
        if kind is dict or member is dict:
            return self.mapping(arguments[1] if arguments else Any, value, path)
        if member is str:
            return self.text(value, path)
        if member is Any:
            return INVALID if any(leaf is UNRESOLVED for _, leaf in leaves(value)) else value
        return _number(member, value)

    def as_written(self, options: tuple[Any, ...], value: bool, path: KeyPath) -> Any:
        """The option that the file writes where YAML reads a bool; the bool if there is none."""
        return next((each for each in options if each == self.document.origin(path).written), value)

    def own_name(self, names: Any, value: Any) -> str:
        """A name that the user's own code knows."""
        if isinstance(value, str) and (value in names.own_names() or self.document.has_unknown_names):
            return value
        raise _MismatchError

    def annotated(self, plain: Any, form: Form | Catalogue, value: Any, path: KeyPath) -> Any:
        """A value whose format is checked after its plain type."""
        if isinstance(form, Catalogue):
            return self.foreign(form, value, path)
        result = self.first_that_takes(plain, value, path)
        try:
            form.check(result)
        except ValueError as error:
            self.document.report(path, str(error))
            return INVALID
        return result

    def foreign(self, catalogue: Catalogue, value: Any, path: KeyPath) -> Any:
        """A section of third-party classes by name; null on the command line removes one."""
        if not isinstance(value, (dict, type(None))):
            raise _MismatchError
        self.nothing_to_leave_out(value or {}, path, catalogue.known)
        kept = {
            name: self.arguments(catalogue, name, kwargs, (*path, name))
            for name, kwargs in (value or {}).items()
            if kwargs is not None or not self.document.origin((*path, name)).is_word
        }
        return INVALID if any(kwargs is INVALID for kwargs in kept.values()) else kept

    def arguments(self, catalogue: Catalogue, name: str, value: Any, path: KeyPath) -> Any:
        """The arguments of one such class, as a dict of the given keys, or INVALID."""
        if name in catalogue.known and isinstance(value, dict):
            try:
                section = self.section(catalogue.section(name), value, path)
            except LookupError as error:
                self.document.report(path, f"can't be checked: {error}.")
                return INVALID
            return section if section is INVALID else {k: v for k, v in vars(section).items() if k in value}
        if self.document.has_unknown_names and name not in catalogue.refused and isinstance(value, dict):
            return value
        if name in catalogue.refused:
            self.document.report(path, f"is not supported: {catalogue.refused[name]}")
        elif name not in catalogue.known:
            names = ", ".join(sorted(catalogue.known))
            allowed = f"Allowed: {names or 'none, before a file in code_paths names some'}."
            self.document.report(path, f"is not known.{did_you_mean(name, catalogue.known)} {allowed}")
        elif value is not UNRESOLVED:
            text = "has no value" if value is None else f"{show(value)} is not allowed here"
            self.document.report(path, f"{text}. Expected its arguments as a section; {{}} for none.")
        return INVALID

    def sequence(self, arguments: tuple[Any, ...], value: Any, path: KeyPath) -> Any:
        """A tuple from a list; a single text counts as a list of one."""
        if value is None and arguments[-1] is Ellipsis:
            return ()
        if arguments[0] is str and not isinstance(value, (list, type(None))):
            value = [self.text(value, path)]
        if isinstance(value, list) and arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise _MismatchError
        items = self.items(arguments[0], value, path)
        return INVALID if items is INVALID else tuple(items)

    def items(self, annotation: Any, value: Any, path: KeyPath) -> Any:
        """A list, each item of one type."""
        if not isinstance(value, list):
            raise _MismatchError
        items = [self.value(annotation, item, (*path, index)) for index, item in enumerate(value)]
        return INVALID if any(item is INVALID for item in items) else items

    def mapping(self, annotation: Any, value: Any, path: KeyPath) -> Any:
        """A dict with names that the user chooses, without sections that are null."""
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
        """Report words such as `callbacks.x=null` that remove a name nobody set."""
        for name, item in value.items():
            if item is None and (*path, name) in self.document.absent and name not in names:
                text = f"nothing has this name, so it can't be left out.{did_you_mean(name, names)}"
                self.document.report((*path, name), text)

    def text(self, value: Any, path: KeyPath) -> str:
        """A text; numbers are taken as written."""
        origin = self.document.origin(path)
        if origin.is_word:
            value = _text_of_word(value, origin)
        if isinstance(value, str):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return origin.written or str(value)
        raise _MismatchError

    def mismatch(self, annotation: Any, value: Any, path: KeyPath) -> str:
        """Why a value does not fit its type, and what is expected."""
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
            options = [option for m in members(annotation) for option in choices_of(m)]
            hint = did_you_mean(value, [choice(option) for option in options])
            if isinstance(value, FromEnvironment) and _fits_unquoted(annotation, value):
                hint = f" Write ${{oc.decode:{origin.expression}}}."
            elif not source and _fits_unquoted(annotation, value):
                hint = " Write it without quotes."
        if str in members(annotation) and _is_a_list_or_mapping(value, origin):
            hint = " Put it in quotes if it is text."
        return f"{show(value)}{source} is not allowed here.{hint} {expected}"

    def unknown_key(self, cls: type, path: KeyPath) -> str:
        """Why the last key of a path is not allowed in a class, with the closest allowed key."""
        key = str(path[-1])
        if (cls.__name__, key) in self.refused:
            return f"is not supported: {self.refused[cls.__name__, key]}"
        names = list(field_types(cls))
        near = did_you_mean(key, names)
        if issubclass(cls, OfSignature):
            return f"unknown key.{near} {cls.__name__} takes {', '.join(names) or 'no arguments'}."
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


def _unchecked(annotation: Any, value: dict[str, Any], classes: tuple[type, ...]) -> tuple[type, ...]:
    """A section for a name that only code knows which was not run."""
    markers = [get_args(m)[1] for m in members(annotation) if get_origin(m) is Annotated]
    name = value.get("name")
    is_new = isinstance(name, str) and name.isidentifier() and name not in map(section_name, classes)
    return tuple(m.unchecked(value) for m in markers if is_new and hasattr(m, "unchecked"))


def _has_usual_name(cls: type) -> bool:
    return all(default_of(field) is not MISSING for field in fields(cls) if field.name == "name")


def _number(member: Any, value: Any) -> Any:
    """An int, a float or a bool; accepts whole floats as ints and ints as floats, but no text."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) != (member is bool):
        raise _MismatchError
    if member is not float and isinstance(value, int):
        return value
    with suppress(OverflowError):  # an int may be too large for a float
        number = float(value)
        if math.isfinite(number) and (member is float or number % 1 == 0):
            return member(number)
    raise _MismatchError


def _text_of_word(value: Any, origin: Origin) -> Any:
    """The value of a command-line word where text is expected: the word as written, unless it is quoted."""
    if _is_a_list_or_mapping(value, origin):
        raise _MismatchError
    is_quoted = isinstance(value, str) and (origin.written or "")[:1] in ("'", '"')
    if not origin.written or origin.expression is not None or value is None or is_quoted:
        return value
    return origin.written


def _is_a_list_or_mapping(value: Any, origin: Origin) -> bool:
    """Whether a word is a list or mapping, such as `[a]` or `{a: b}`; `{a}` and `note: b` may be text."""
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
