"""A configuration as it was written: the values of a YAML and of the command line, each with its place.

OmegaConf reads the YAML, merges the words of the command line into it and resolves interpolations; PyYAML's
node tree tells the lines. A path is the tuple of keys and list indices that leads to a value; its origin is
the line or the word that the value comes from.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mptfoundry.errors import ConfigError

KeyPath = tuple[str | int, ...]
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_KEY = re.compile(r"[A-Za-z_][^=\s]*")
_DEEPEST = 60
UNRESOLVED: Any = object()


def dotted(path: KeyPath) -> str:
    """A path as users write it: `train_loader.dataset.streams.code`, `eval_loader[0].label`."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return text.removeprefix(".")


@dataclass(frozen=True)
class Origin:
    """Where a value comes from.

    Attributes:
        place: `FILE:LINE`, or `command line: WORD`.
        line: The line in the file; words of the command line come after all lines.
        written: A scalar as it was written, before it became a number or a bool.
        expression: The interpolation that gave the value.
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
        origins: Where values come from; a path that is not there comes from where its parent does.
        problems: Where and what.
        references: The keys that interpolations refer to.
    """

    name: str
    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, Origin] = field(default_factory=dict)
    problems: list[tuple[Origin, str]] = field(default_factory=list)
    references: set[str] = field(default_factory=set)

    def origin(self, path: KeyPath) -> Origin:
        """The origin of a value, or of the section it would stand in."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return Origin(self.name, 0)

    def report(self, path: KeyPath, text: str, at: KeyPath | None = None) -> None:
        """Note a problem of the value at `path`, once; `at` has the place to name, where it is another."""
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
        """Raise all problems as one ConfigError, in the order of the lines.

        Raises:
            ConfigError: There are problems.
        """
        if self.problems:
            raise ConfigError([text for _, text in sorted(self.problems, key=lambda p: p[0].line)])

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

    def put(self, path: KeyPath, value: Any, origin: Origin) -> None:
        """Set the value at `path`, whose parent exists; it comes from `origin`."""
        self.get(path[:-1])[path[-1]] = value
        self.origins[path] = origin

    def take(self, path: KeyPath) -> Any:
        """Remove the value at `path` and return it."""
        return self.get(path[:-1]).pop(path[-1], None)


def read_document(path: str | Path | None, words: Sequence[str]) -> Document:
    """Read a YAML file, if one is given, merge `key=value` words into it, and resolve interpolations.

    Values that can't be resolved become problems of the document.

    Raises:
        ConfigError: The file can't be read, is no YAML, or has a key twice; a word can't be understood.
    """
    document = Document("command line" if path is None else str(path))
    config = _read_file(Path(path), document) if path is not None else OmegaConf.create({})
    for word in words:
        _apply_word(config, word, document)
    document.raise_problems()
    document.tree = _resolve(config, OmegaConf.to_container(config, resolve=False), (), document)
    return document


def _read_file(path: Path, document: Document) -> DictConfig:
    text = read_text(path)
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_unreadable(path, error)) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is no YAML: {str(error).splitlines()[0]}.") from None
    if node is None:
        raise ConfigError(f"{path}: is empty. A configuration has at least model, data and optimizer.")
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: has no `key: value` lines at the top.")
    _note_lines(node, (), path, document, 0)
    document.raise_problems()
    try:
        config = OmegaConf.create(text)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{_place_of(error, path, document)}: {_first_line(error)}.") from None
    assert isinstance(config, DictConfig)
    return config


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        ConfigError: It isn't there, can't be read or is not UTF-8.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, _yaml_names(path.parent), 1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"{path}: there is no such file.{hint}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder. Name a YAML file.") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}.") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: is not UTF-8 text. Save the file as UTF-8.") from None


def _yaml_names(folder: Path) -> list[str]:
    try:
        return [p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml")]
    except OSError:
        return []


def _unreadable(path: Path, error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    line = f":{mark.line + 1}" if mark else ""
    problem = error.problem or error.context or "unreadable"
    hints = {
        "cannot start any token": "Indent with spaces, not tabs; text that begins with @, ` or % needs quotes.",
        "mapping values": "A value that contains `: ` needs quotes.",
        "but found another document": "Keep one document in a file.",
        "alias": "A value that begins with * needs quotes.",
    }
    said = f"{problem} {error.context or ''}"
    hint = next((text for sign, text in hints.items() if sign in said), "")
    return f"{path}{line}: is no YAML here: {problem}. {hint}".rstrip()


def _note_lines(node: yaml.Node, path: KeyPath, file: Path, document: Document, depth: int) -> None:
    if depth > _DEEPEST:
        raise ConfigError(f"{file}:{node.start_mark.line + 1}: is nested too deeply, or in itself.")
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _note_value(item, item.start_mark.line + 1, (*path, index), file, document, depth)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{file}:{line}: a key has to be a plain name.")
            if key.value in seen:
                place = Origin(f"{file}:{line}", line)
                text = f"is given twice, in lines {seen[key.value]} and {line}. Remove one."
                document.problems.append((place, f"{file}:{line}: {dotted((*path, key.value))}: {text}"))
            seen[key.value] = line
            if key.tag.endswith(":merge"):
                _note_lines(value, path, file, document, depth + 1)
            else:
                _note_value(value, line, (*path, key.value), file, document, depth)


def _note_value(
    node: yaml.Node, line: int, path: KeyPath, file: Path, document: Document, depth: int
) -> None:
    written = node.value if isinstance(node, yaml.ScalarNode) and node.style is None else None
    document.origins[path] = Origin(f"{file}:{line}", line, written)
    _note_lines(node, path, file, document, depth + 1)


def _place_of(error: Exception, path: Path, document: Document) -> str:
    key = getattr(error, "full_key", None)
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"{path}:{mark.line + 1}"
    return f"{document.origin(parse_key(key)).place}: {key}" if key else str(path)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def parse_key(key: str) -> KeyPath:
    """`eval_loader[0].label` or `eval_loader.0.label` as a path."""
    parts = re.split(r"\.|\[", key.replace("]", ""))
    return tuple(int(part) if part.isdigit() else part for part in parts if part)


def _apply_word(config: DictConfig, word: str, document: Document) -> None:
    """Merge one `key=value` word; a value that is no YAML is taken as text."""
    key, equals, text = word.partition("=")
    origin = Origin(f"command line: {word}", 1_000_000 + len(document.origins), text, is_word=True)
    if not equals or not _KEY.fullmatch(key):
        hint = ""
        if key.startswith("-") and key.strip("-"):
            hint = (
                f" Options are written without dashes: {key.lstrip('-').replace('-', '_')}={text or 'value'}."
            )
        raise ConfigError(f"command line: '{word}' is not of the form key=value, without spaces.{hint}")
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]  # type: ignore[index,call-overload]
    except (OmegaConfBaseException, yaml.YAMLError, ValueError):
        value = text
    path = parse_key(key)
    try:
        _open_blank_sections(config, path)
        OmegaConf.update(config, key, value)
    except (OmegaConfBaseException, IndexError, ValueError, TypeError, AssertionError) as error:
        reason = _first_line(error) if str(error) else "there is no such place"
        document.problems.append((origin, f"command line: {word}: {reason}."))
        return
    if not isinstance(value, dict):
        for known in [p for p in document.origins if p[: len(path)] == path]:
            del document.origins[known]
    for length in range(1, len(path)):
        document.origins.setdefault(path[:length], origin)
    document.origins[path] = origin
    for below, leaf in _leaves(value, path):
        if below != path:
            document.origins[below] = Origin(origin.place, origin.line, str(leaf), is_word=True)


def _open_blank_sections(config: DictConfig, path: KeyPath) -> None:
    node: Any = config
    for key in path[:-1]:
        if not isinstance(node, DictConfig) or key not in node or OmegaConf.is_interpolation(node, key):
            return
        if node[key] is None:
            node[key] = {}
        node = node[key]


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*path, str(key)))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))
    elif value is not None:
        yield path, value


def _resolve(node: Any, raw: Any, path: KeyPath, document: Document) -> Any:
    """Plain values of an OmegaConf node; what can't be resolved becomes a problem, and UNRESOLVED."""
    if isinstance(raw, dict):
        return {str(key): _resolve_child(node, key, raw[key], (*path, str(key)), document) for key in raw}
    return [_resolve_child(node, index, raw[index], (*path, index), document) for index in range(len(raw))]


def _resolve_child(node: Any, key: Any, raw: Any, path: KeyPath, document: Document) -> Any:
    if isinstance(raw, (dict, list)):
        return _resolve(node[key], raw, path, document)
    if not isinstance(raw, str) or ("${" not in raw and raw != "???"):
        return raw
    old = document.origin(path)
    document.references.update(re.findall(r"\$\{\s*([\w.\[\]]+)\s*\}", raw))
    try:
        value = node[key]
    except (OmegaConfBaseException, RecursionError, ValueError, TypeError) as error:
        document.report(path, _unresolved(raw, error, document))
        return UNRESOLVED
    document.origins[path] = Origin(old.place, old.line, None, raw, old.is_word)
    if not OmegaConf.is_config(value):
        return value
    if len(path) > _DEEPEST:
        document.report(path, f"{raw} refers to a section that it stands in.")
        return UNRESOLVED
    return _resolve(value, OmegaConf.to_container(value, resolve=False), path, document)


def _unresolved(raw: str, error: Exception, document: Document) -> str:
    if raw == "???":
        return "has to be given, for example on the command line."
    wanted = re.search(r"\$\{([\w.\[\]]+)\}", raw)
    if "Interpolation key" in str(error) and wanted:
        known = [dotted(path) for path in document.origins]
        near = difflib.get_close_matches(wanted[1], known, 1)
        hint = f" Did you mean ${{{near[0]}}}?" if near else ""
        return f"{raw} refers to a key that is not there.{hint}"
    return f"{raw} can't be resolved: {_first_line(error)}."
