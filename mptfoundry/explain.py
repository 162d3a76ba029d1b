"""What a key of the configuration means: its type, default and choices, from the classes' docstrings."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from mptfoundry.config.engine.document import parse_key
from mptfoundry.config.engine.schema import (
    default_of,
    describe,
    field_types,
    meanings,
    section_name,
    sections,
    show,
    subject,
    walk_keys,
)
from mptfoundry.config.engine.signatures import Catalogue, described, sentence_of
from mptfoundry.config.legacy import REFUSED
from mptfoundry.config.run import TrainConfig
from mptfoundry.errors import ConfigError

_WIDTH = 100


def explain(key: str | None = None) -> str:
    """Explain a key of a training run's configuration.

    Args:
        key: A path such as `optimizer.lr`, or the last part of one such as `lr`: then every key of that name.
            None lists all sections.

    Raises:
        ConfigError: There is no such key; the text has the nearest ones.
    """
    if not key:
        return _overview()
    asked = tuple(str(part) for part in parse_key(key) if not isinstance(part, int))
    known = dict.fromkeys(walk_keys(TrainConfig))
    exact = [entry for entry in known if _matches(entry[0], asked)]
    ending = [entry for entry in known if _ends_with(entry[0], asked)]
    entries = exact or ending
    if entries:
        return "\n\n".join(_entry(path, cls, name) for path, cls, name in _one_each(entries))
    if text := _foreign(asked) or _refused(asked):
        return text
    hint = _nearest(key, [path for path, _, _ in known if not path.startswith("eval_loader[N]")])
    raise ConfigError(f"{key}: there is no such key.{hint} `mptfoundry explain` lists all sections.")


def options_of(schema: type) -> str:
    """The options of a verb, one a paragraph: key, type, default and meaning."""
    lines = []
    for field in fields(schema):
        annotation = field_types(schema)[field.name]
        has_default = default_of(field) not in (MISSING, None)
        default = "" if not has_default else f"; default {_default(field)}"
        needed = "; required" if default_of(field) is MISSING else ""
        lines.append(f"  {field.name}: {describe(annotation)}{default}{needed}")
        lines += _wrapped(meanings(schema).get(field.name, ""), "      ")
    return "\n".join(lines)


def _nearest(key: str, paths: list[str]) -> str:
    by_name: dict[str, list[str]] = {}
    for path in paths:
        by_name.setdefault(path.rpartition(".")[2], []).append(path)
    near = by_name.get(key.rpartition(".")[2], [])
    near += difflib.get_close_matches(key, paths, 3)
    for name in difflib.get_close_matches(key.rpartition(".")[2], list(by_name), 3):
        near += by_name[name]
    near = list(dict.fromkeys(near))[:4]
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _matches(path: str, asked: tuple[str, ...]) -> bool:
    parts = path.replace("[N]", "").split(".")
    return len(parts) == len(asked) and all(p in ("*", w) for p, w in zip(parts, asked, strict=True))


def _ends_with(path: str, asked: tuple[str, ...]) -> bool:
    return tuple(path.replace("[N]", "").split(".")[-len(asked) :]) == asked


def _one_each(entries: list[tuple[str, type, str]]) -> Iterator[tuple[str, type, str]]:
    """One entry for each thing said: the evaluation loader repeats what the training loader says, and models
    that differ in their head what all of them have.
    """
    seen = set()
    for path, cls, name in entries:
        owner = next(base for base in cls.__mro__ if name in vars(base).get("__annotations__", ()))
        if (owner, name) not in seen:
            seen.add((owner, name))
            yield path, cls, name


def _entry(path: str, cls: type, name: str) -> str:
    annotation = field_types(cls)[name]
    field = next(f for f in fields(cls) if f.name == name)
    is_own = name in vars(cls).get("__annotations__", ())
    of = f"  (name: {section_name(cls)})" if section_name(cls) and "." in path and is_own else ""
    lines = [f"{path}{of}", *_wrapped(meanings(cls).get(name, ""))]
    classes = sections(annotation)
    if classes:
        lines += _section_lines(classes)
    else:
        lines.append(f"    type: {describe(annotation)}")
    lines.append(f"    default: {_default(field)}")
    catalogue = _catalogue(annotation)
    if catalogue:
        lines += _wrapped(f"known: {', '.join(sorted(catalogue.known))}")
    return "\n".join(lines)


def _default(field: Any) -> str:
    default = default_of(field)
    if default is MISSING:
        return "none; required"
    if is_dataclass(default):
        return "those of its keys"
    return default if isinstance(default, str) and default else show(default)


def _section_lines(classes: tuple[type, ...]) -> list[str]:
    lines = []
    for cls in classes:
        name = f"name: {section_name(cls)}. " if section_name(cls) else ""
        lines += _wrapped(f"{name}{subject(cls)}")
        lines += _wrapped(f"keys: {', '.join(field_types(cls))}", "        ")
    return lines


def _wrapped(text: str, indent: str = "    ") -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)


def _catalogue(annotation: Any) -> Catalogue | None:
    return next((a for a in getattr(annotation, "__metadata__", ()) if isinstance(a, Catalogue)), None)


def _foreign(asked: tuple[str, ...]) -> str | None:
    """`callbacks.speed_monitor`, or `callbacks.speed_monitor.window_size`, from the class's signature."""
    for section, annotation in field_types(TrainConfig).items():
        catalogue = _catalogue(annotation)
        names = asked[1:] if asked[:1] == (section,) else asked
        if catalogue is None or not names or names[0] not in catalogue.known:
            continue
        where = catalogue.known[names[0]]
        try:
            cls = described(names[0], where)
            arguments = [each for each in fields(cls) if len(names) == 1 or each.name == names[1]]
            sentence = sentence_of(where) if len(names) == 1 else ""
        except LookupError as error:
            raise ConfigError(f"{section}.{names[0]}: can't be explained: {error}.") from None
        if not arguments and len(names) > 1:
            continue
        lines = [f"{section}.{names[0]}", *_wrapped(sentence), f"    {where.replace(':', '.')}"]
        for argument in arguments:
            default = "required" if argument.default is MISSING else f"default {argument.default}"
            lines.append(f"    {argument.name}: {describe(field_types(cls)[argument.name])}; {default}")
        return "\n".join(lines)
    return None


def _refused(asked: tuple[str, ...]) -> str | None:
    """What llm-foundry knows and what is not supported here, with the reason."""
    above = ".".join(asked[:-1])
    owners = {cls.__name__ for path, cls, _ in walk_keys(TrainConfig) if path.rpartition(".")[0] == above}
    owners |= set(asked[:-1])
    tables = {name: why for (owner, name), why in REFUSED.items() if not above or owner in owners}
    for section, annotation in field_types(TrainConfig).items():
        catalogue = _catalogue(annotation)
        if catalogue is not None and asked[:-1] in ((), (section,)):
            tables |= catalogue.refused
    if asked[-1] not in tables:
        return None
    return "\n".join([".".join(asked), *_wrapped(f"is not supported: {tables[asked[-1]]}")])


def _overview() -> str:
    lines = [f"{subject(TrainConfig)} `mptfoundry explain KEY` says more, for any key at any depth.", ""]
    for name, annotation in field_types(TrainConfig).items():
        meaning = meanings(TrainConfig).get(name, "").split(". ")[0].rstrip(".")
        lines += textwrap.wrap(f"{name}: {meaning}", _WIDTH, subsequent_indent="    ")
        for cls in sections(annotation):
            keys = ", ".join(field_types(cls))
            lines += _wrapped(f"{section_name(cls)}: {keys}" if section_name(cls) else keys)
    return "\n".join(lines)
