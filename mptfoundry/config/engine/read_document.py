"""Read a document: load a YAML file, merge `key=value` words into it, resolve interpolations.

OmegaConf reads, merges and resolves; PyYAML's node tree provides the line numbers.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from mptfoundry.config.engine.document import UNRESOLVED, Document, KeyPath, Origin, dotted, parse_key
from mptfoundry.config.engine.nested import leaves, mapped
from mptfoundry.config.engine.secrets import REDACTED, FromEnvironment, may_be_read
from mptfoundry.errors import ConfigError, first_line

DEEPEST = 60
MOST_VALUES = 100_000
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_KEY = re.compile(r"[A-Za-z_][^=\s]*")


def read_document(
    path: str | Path | None, words: Sequence[str], defaults: Mapping[str, str] | None = None
) -> Document:
    """Read a YAML file, if one is given, merge `key=value` words into it, and resolve interpolations.

    Values that can't be resolved become problems of the document. `defaults` are top-level values that
    interpolations may refer to even if the file doesn't set them.

    Raises:
        ConfigError: The file can't be read, is not YAML, or has a key twice; a word is not `key=value`.
    """
    document = Document("command line" if path is None else str(path))
    config = _read_file(Path(path), document) if path is not None else OmegaConf.create({})
    for word in words:
        _apply_word(config, word, document)
    document.raise_problems()
    for key, value in (defaults or {}).items():
        with suppress(OmegaConfBaseException):
            if config.get(key) is None:
                config[key] = value
    document.tree = _resolve(config, OmegaConf.to_container(config, resolve=False), (), document)
    return document


class _Environment:
    """`${oc.env:NAME}`, and whether the last lookup found a value; `quotes` returns the expression."""

    def __init__(self) -> None:
        self.was_read = False
        self.quotes = False

    def __call__(self, name: str, *default: Any) -> Any:
        """The value of a variable, or the default."""
        value = _environment_variable(name, *default)
        if name not in os.environ:
            return value
        self.was_read = True
        words = [name, *("null" if each is None else _quoted(str(each)) for each in default)]
        return f"${{oc.env:{','.join(words)}}}" if self.quotes else value

    def expression(self, node: Any, key: Any) -> str:
        """A value in which everything except the environment is resolved."""
        self.quotes = True
        try:
            return str(node[key])
        except (OmegaConfBaseException, RecursionError, ValueError, TypeError):
            return REDACTED
        finally:
            self.quotes = False


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _environment_variable(name: str, *default: Any) -> Any:
    """Refuse secrets: a file from someone else could leak one in a URL."""
    if not may_be_read(name, os.environ.get(name, "")):
        raise ValueError(
            f"{name} may be a secret, which no file reads. Give the value on the command line, or leave it "
            "to the package that needs it"
        )
    return oc.env(name, *default)


# Checked in the resolver, because a variable's name may be an interpolation itself.
_environment = _Environment()
OmegaConf.register_resolver("oc.env", _environment, replace=True)


def _read_file(path: Path, document: Document) -> DictConfig:
    text = read_text(path)
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(_why_not_yaml(path, error)) from None
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(_why_not_a_config(path, node))
    _Lines(path, document).note(node, line=1)
    document.raise_problems()
    try:
        config = OmegaConf.create(text)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{_place_of(error, path, document)}: {first_line(error)}.") from None
    assert isinstance(config, DictConfig)
    return config


def read_text(path: Path) -> str:
    """The text of a file; ConfigError if it is missing, unreadable or not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(_why_unreadable(path, error)) from None


def _why_unreadable(path: Path, error: OSError | UnicodeDecodeError) -> str:
    if isinstance(error, FileNotFoundError):
        near = difflib.get_close_matches(path.name, _yaml_names(path.parent), 1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        return f"{path}: there is no such file.{hint}"
    if isinstance(error, IsADirectoryError):
        return f"{path}: is a folder. Name a YAML file."
    if isinstance(error, OSError):
        return f"{path}: can't be read: {error.strerror}."
    line = error.object.count(b"\n", 0, error.start) + 1
    return f"{path}:{line}: is not UTF-8 text. Save the file as UTF-8."


def _yaml_names(folder: Path) -> list[str]:
    try:
        return [p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml")]
    except OSError:
        return []


def _why_not_a_config(path: Path, node: yaml.Node | None) -> str:
    if node is None:
        return f"{path}: is empty. A configuration has at least model, data and optimizer."
    return f"{path}:{node.start_mark.line + 1}: has no `key: value` lines at the top."


def _why_not_yaml(path: Path, error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return f"{path}: is not valid YAML: {first_line(error)}."
    mark = error.problem_mark or error.context_mark
    line = f":{mark.line + 1}" if mark else ""
    problem = error.problem or error.context or "unreadable"
    hints = {
        "tab character": "Indent with spaces.",
        "cannot start any token": "Indent with spaces, not tabs; quote text that begins with @, ` or %.",
        "mapping values": "A value that contains `: ` needs quotes.",
        "but found another document": "Keep one document in a file.",
        "alias": "A value that begins with * needs quotes.",
    }
    said = f"{problem} {error.context or ''}"
    hint = next((text for sign, text in hints.items() if sign in said), "")
    return f"{path}{line}: is not valid YAML here: {problem}. {hint}".rstrip()


class _Lines:
    """Records the line of every value of a YAML file, and duplicate keys."""

    def __init__(self, file: Path, document: Document) -> None:
        self.file = file
        self.document = document
        self.seen: dict[int, KeyPath] = {}
        self.values = 0

    def note(self, node: yaml.Node, line: int, path: KeyPath = ()) -> None:
        """Record a value and everything below it."""
        self.values += 1
        if len(path) > DEEPEST:
            raise ConfigError(f"{self.file}:{line}: is nested too deeply, or contains itself.")
        if self.values > MOST_VALUES:  # aliases of aliases can expand to billions of values
            raise ConfigError(f"{self.file}:{line}: has more than {MOST_VALUES:,} values. Use fewer.")
        self.note_alias(node)
        self.seen.setdefault(id(node), path)
        if path:
            is_plain = isinstance(node, yaml.ScalarNode) and node.style not in ("'", '"')
            written = node.value if is_plain else None
            self.document.origins[path] = Origin(f"{self.file}:{line}", line, written)
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.note(item, item.start_mark.line + 1, (*path, index))
        elif isinstance(node, yaml.MappingNode):
            self.note_mapping(node, path)

    def note_mapping(self, node: yaml.MappingNode, path: KeyPath) -> None:
        """Record the keys of a section."""
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{self.file}:{line}: a key must be a plain name.")
            if key.value in lines:
                where = f"{self.file}:{line}: {dotted((*path, key.value))}"
                text = f"{where}: is given twice, in lines {lines[key.value]} and {line}. Remove one."
                self.document.problems.append((Origin(where, line), text))
            lines[key.value] = line
            if key.value == "<<":
                self.note_merged(value, node, path)
            else:
                self.note(value, line, (*path, key.value))

    def note_merged(self, value: yaml.Node, node: yaml.MappingNode, path: KeyPath) -> None:
        """Record the keys that `<<` takes from other sections."""
        for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            self.note_alias(merged)
            self.note_lost(merged, node, path)
            if isinstance(merged, yaml.MappingNode):
                self.note_mapping(merged, path)

    def note_lost(self, merged: yaml.Node, node: yaml.MappingNode, path: KeyPath) -> None:
        """Record keys of a merged section that have no effect, because a section here replaces it."""
        for key, value in merged.value if isinstance(merged, yaml.MappingNode) else ():
            name, own = next((pair for pair in node.value if pair[0].value == key.value), (None, None))
            if isinstance(value, yaml.MappingNode) and isinstance(own, yaml.MappingNode) and name is not None:
                kept = {inner.value for inner, _ in own.value}
                lost = [inner.value for inner, _ in value.value if inner.value not in kept]
                if lost:
                    place = f"{self.file}:{name.start_mark.line + 1}: {dotted((*path, key.value))}"
                    text = f"a merged section, whose {', '.join(map(str, lost))} has no effect"
                    self.document.notes.append(f"{place}: takes the place of {text}.")

    def note_alias(self, node: yaml.Node) -> None:
        """Record an alias: a node that occurs again refers to its first key."""
        if id(node) in self.seen:
            self.document.references.add(dotted(self.seen[id(node)]))


def _place_of(error: Exception, path: Path, document: Document) -> str:
    key = getattr(error, "full_key", None)
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"{path}:{mark.line + 1}"
    return f"{document.origin(parse_key(key)).place}: {key}" if key else str(path)


def _apply_word(config: DictConfig, word: str, document: Document) -> None:
    """Merge one `key=value` word; a value that is not valid YAML is text."""
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
    if value is None and path not in document.origins:
        document.absent.add(path)
    try:
        _open_blank_sections(config, path)
        OmegaConf.update(config, key, value)
    except (OmegaConfBaseException, IndexError, ValueError, TypeError, AssertionError) as error:
        is_outside = isinstance(error, (IndexError, AssertionError)) or "out of range" in str(error)
        reason = f"there is no {key}" if is_outside else _why_no_entry(config, path) or first_line(error)
        document.problems.append((origin, f"command line: {word}: {reason}."))
        return
    if not isinstance(value, dict):
        for known in [p for p in document.origins if p[: len(path)] == path]:
            del document.origins[known]
    for length in range(1, len(path)):
        old = document.origins.get(path[:length])
        if old is None or old.written is not None:
            document.origins[path[:length]] = origin
    document.origins[path] = origin
    for below, leaf in leaves(value, path):
        if below != path and leaf not in (None, {}, []):
            document.origins[below] = Origin(origin.place, origin.line, str(leaf), is_word=True)


def _why_no_entry(config: DictConfig, path: KeyPath) -> str | None:
    """Why a key names nothing below a list: it lacks the number of the entry."""
    node: Any = config
    for length, key in enumerate(path):
        if isinstance(node, ListConfig) and not isinstance(key, int):
            parent, rest = dotted(path[:length]), dotted(path[length:])
            return f"{parent} is a list of {len(node)}. Name one of its entries, as in {parent}[0].{rest}"
        node = node[key]
    return None


def _open_blank_sections(config: DictConfig, path: KeyPath) -> None:
    node: Any = config
    for key in path[:-1]:
        if not isinstance(node, DictConfig) or key not in node or OmegaConf.is_interpolation(node, key):
            return
        if node[key] is None:
            node[key] = {}
        node = node[key]


def _resolve(node: Any, raw: Any, path: KeyPath, document: Document) -> Any:
    """Plain values of an OmegaConf node; a value that can't be resolved is a problem, and UNRESOLVED."""
    if isinstance(raw, dict):
        return {str(key): _resolve_child(node, key, raw[key], (*path, str(key)), document) for key in raw}
    return [_resolve_child(node, index, raw[index], (*path, index), document) for index in range(len(raw))]


def _resolve_child(node: Any, key: Any, raw: Any, path: KeyPath, document: Document) -> Any:
    if isinstance(raw, (dict, list)):
        has_more = "${" in str(raw) or "???" in str(raw)  # else its node, slow to look up, isn't needed
        return _resolve(node[key] if has_more else None, raw, path, document)
    is_plain = not isinstance(raw, str) or ("${" not in raw and raw != "???")
    return raw if is_plain else _interpolated(node, key, raw, path, document)


def _interpolated(node: Any, key: Any, raw: str, path: KeyPath, document: Document) -> Any:
    old = document.origin(path)
    document.references.update(re.findall(r"\$\{\s*([\w.\[\]]+)\s*\}", raw))
    _environment.was_read = False
    try:
        value = node[key]
    except (OmegaConfBaseException, RecursionError, ValueError, TypeError) as error:
        document.report(path, _unresolved(raw, error, document))
        return UNRESOLVED
    if _environment.was_read and not OmegaConf.is_config(value):
        expression = _environment.expression(node, key)
        # A section or list from the environment has no text to write.
        value = mapped(
            value,
            lambda leaf, at: (
                FromEnvironment(leaf, REDACTED if at else expression) if isinstance(leaf, str) else leaf
            ),
        )
    document.origins[path] = Origin(old.place, old.line, None, raw, old.is_word)
    if not OmegaConf.is_config(value):
        return value
    if len(path) > DEEPEST:
        document.report(path, f"{raw} refers to a section that contains it.")
        return UNRESOLVED
    return _resolve(value, OmegaConf.to_container(value, resolve=False), path, document)


def _unresolved(raw: str, error: Exception, document: Document) -> str:
    if raw == "???":
        return "is required. Give it, for example on the command line."
    reference = re.search(r"\$\{([\w.\[\]]+)\}", raw)
    if "Interpolation key" in str(error) and reference:
        known = [dotted(path) for path in document.origins]
        near = difflib.get_close_matches(reference[1], known, 1)
        hint = f" Did you mean ${{{near[0]}}}?" if near else ""
        return f"{raw} refers to a key that does not exist.{hint}"
    reason = re.sub(r"^\w+ raised while resolving interpolation: ", "", first_line(error))
    return f"{raw} can't be resolved: {reason}."
