"""The folder where lm-evaluation-harness defines a public task, without its index of 14,000 files.

The index takes a minute or more. A task, a group and a tag are each named in a line of their
own, so that a regular expression finds the folders which are then read.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path

# Keys may be quoted; a tag is a name or a list of them.
_NAME = re.compile(r"""^["']?(?:task|group)["']?:[ ]*["']?([^\s"'#\[\]{}]+)""", re.MULTILINE)
_TAGS = re.compile(r"""^["']?tag["']?:[ ]*(.*(?:\n[ ]*-.*)*)""", re.MULTILINE)
_INCLUDE = re.compile(r"""^["']?include["']?:[ ]*["']?([^\s"'#]+)""", re.MULTILINE)
_WORD = re.compile(r"[\w./:+-]*\w")
_CODE = re.compile(r"!function\b")


def defaults_folder() -> Path:
    """The folder of the tasks that come with lm-eval."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "tasks"


def files_of_names(folder: Path) -> Mapping[str, frozenset[Path]]:
    """Task, group or tag -> the YAML files below a folder that define it."""
    files: dict[str, set[Path]] = {}
    for path in folder.rglob("*.yaml"):
        for name in _names_in(path):
            files.setdefault(name, set()).add(path)
    return {name: frozenset(paths) for name, paths in files.items()}


@cache
def files_of_public_names() -> Mapping[str, frozenset[Path]]:
    """The same for all tasks that come with lm-eval."""
    return files_of_names(defaults_folder())


def folders_of(names: Collection[str]) -> list[Path]:
    """The folders of lm-eval's own tasks, groups and tags of these names; none is inside another."""
    known = files_of_public_names()
    folders = {path.parent for name in names for path in known.get(name, ())}
    return sorted(folder for folder in folders if not folders & set(folder.parents))


def lines_with_code(folder: Path) -> Iterator[tuple[Path, int]]:
    """The YAML files below a folder that run Python code, with the first such line."""
    for path in sorted(each for each in folder.rglob("*") if each.is_file() and each.suffix != ".py"):
        text = path.read_text(encoding="utf-8", errors="replace")
        if match := _CODE.search(text):
            yield path, text.count("\n", 0, match.start()) + 1


def _names_in(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    yield from _NAME.findall(text)
    yield from _tags_in(text)
    for name in _INCLUDE.findall(text):
        yield from _tags_of_template(path.parent / name)


@cache
def _tags_of_template(path: Path) -> tuple[str, ...]:
    """The tags of a file that others include, and of those that it includes itself."""
    if not path.is_file():
        return ()
    text = path.read_text(encoding="utf-8", errors="replace")
    inherited = (path.parent / name for name in _INCLUDE.findall(text) if name != path.name)
    return (*_tags_in(text), *(tag for each in inherited for tag in _tags_of_template(each)))


def _tags_in(text: str) -> Iterator[str]:
    for value in _TAGS.findall(text):
        yield from _WORD.findall(value)
