"""A configuration as written: the values of a YAML file and of the command line, with their origins.

A path is the tuple of keys and list indices that leads to a value. A value's origin is its line in the file
or its word on the command line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from mptfoundry.errors import ConfigError

KeyPath = tuple[str | int, ...]
# A value whose interpolation failed; the resolver reports the problem.
UNRESOLVED: Any = object()


# Longer words and quotes in an error are truncated.
_LONG = re.compile(r"'[^']{160,}'|\S{160,}")
_SHOWN = 120


def _shown(origin: Origin, text: str) -> str:
    """The text of a problem, with long values truncated and without control characters."""
    is_long = len(origin.place) > _SHOWN and origin.is_word
    place, said = ("", text) if is_long or not text.startswith(origin.place) else (origin.place, text)
    said = _LONG.sub(lambda match: f"{match[0][:_SHOWN]}...", said.removeprefix(place))
    return place + "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in said)


def dotted(path: KeyPath) -> str:
    """A path as users write it: `train_loader.dataset.streams.code`, `eval_loader[0].label`."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return text.removeprefix(".")


def parse_key(key: str) -> KeyPath:
    """`eval_loader[0].label` or `eval_loader.0.label` as a path."""
    parts = re.split(r"\.|\[", key.replace("]", ""))
    return tuple(int(part) if part.isdigit() else part for part in parts if part)


@dataclass(frozen=True)
class Origin:
    """Where a value comes from.

    Attributes:
        place: `FILE:LINE`, or `command line: WORD`.
        line: The line in the file; command-line words sort after all lines.
        written: A scalar's text, before it became a number or a bool.
        expression: The interpolation that produced the value.
    """

    place: str
    line: int
    written: str | None = None
    expression: str | None = None
    is_word: bool = False


@dataclass
class Document:
    """Resolved values with their origins, and the problems found so far.

    Attributes:
        name: The file as the user named it, or `command line`.
        tree: The values: nested dicts and lists.
        origins: The origins of values; a path that was not given has its parent's origin.
        problems: The problems with their places.
        absent: Paths that words remove although they were not given.
        references: The keys that interpolations and YAML aliases refer to.
        notes: Notes for the user on how the file was read.
        has_unknown_names: Whether code that was not run here may know names that are unknown here.
    """

    name: str
    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, Origin] = field(default_factory=dict)
    problems: list[tuple[Origin, str]] = field(default_factory=list)
    absent: set[KeyPath] = field(default_factory=set)
    references: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    has_unknown_names: bool = False

    def origin(self, path: KeyPath) -> Origin:
        """The origin of a value, or of its section if the value was not given."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return Origin(self.name, 0)

    def report(self, path: KeyPath, text: str, at: KeyPath | None = None) -> None:
        """Record a problem of the value at `path`, once; `at` overrides the place to name."""
        origin = self.origin(path if at is None else at)
        key = dotted(path)
        is_said = origin.is_word and origin.place.startswith(f"command line: {key}=")
        problem = (
            origin,
            f"{origin.place}: {text}" if is_said or not key else f"{origin.place}: {key}: {text}",
        )
        if problem not in self.problems:
            self.problems.append(problem)

    def raise_problems(self) -> None:
        """Raise the problems, if there are any, as one ConfigError in the order of the lines."""
        if self.problems:
            raise ConfigError(
                [_shown(*problem) for problem in sorted(self.problems, key=lambda p: p[0].line)]
            )

    def get(self, path: KeyPath) -> Any:
        """The value at `path`, or None."""
        value: Any = self.tree
        for key in path:
            if isinstance(value, dict):
                value = value.get(key)
            elif isinstance(value, list) and isinstance(key, int) and key < len(value):
                value = value[key]
            else:
                return None
        return value

    def has(self, path: KeyPath) -> bool:
        """Whether the section at `path` has the last key, even if it is blank."""
        parent = self.get(path[:-1])
        return isinstance(parent, dict) and path[-1] in parent

    def put(self, path: KeyPath, value: Any, origin: Origin) -> None:
        """Set the value at `path`, with its `origin`. Creates missing or blank sections; does nothing if a
        parent is not a section.
        """
        for length in range(1, len(path)):
            if self.get(path[:length]) is None:
                self.put(path[:length], {}, origin)
        if isinstance(self.get(path[:-1]), dict):
            self.get(path[:-1])[path[-1]] = value
            self.origins[path] = origin

    def take(self, path: KeyPath) -> Any:
        """Remove the value at `path` and return it."""
        return self.get(path[:-1]).pop(path[-1], None)
