"""Generate docs from the code: a config's keys, the command line, and the tests' injected faults.

    python scripts/write_docs.py

`make docs` runs it and builds the site; a test compares the pages with the classes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from mptfoundry.cli import VERBS
from mptfoundry.config import verbs
from mptfoundry.config.engine.schema import (
    default_of,
    describe,
    field_types,
    meanings,
    section_name,
    show,
    subject,
    walk_keys,
)
from mptfoundry.config.run import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
TABLE = re.compile(r"(<!-- The table is written .*? -->\n).*?(<!-- end of the table -->)", re.DOTALL)
GENERATED = "<!-- Written by scripts/write_docs.py from the classes in mptfoundry/config/. -->\n"


def main(words: list[str]) -> None:
    if words:
        raise SystemExit(f"error: {words[0]}: takes no words.")
    for name, text in pages().items():
        (ROOT / "docs" / name).write_text(text)
        print(f"wrote docs/{name}")


def pages() -> dict[str, str]:
    """The generated pages: path below docs/ -> Markdown."""
    return {
        "reference/config.md": config_page(),
        "reference/cli.md": cli_page(),
        "internals/reliability.md": reliability_page(),
    }


def config_page() -> str:
    """All sections of a training config, each with its keys."""
    parts = [
        GENERATED,
        "# Configuration",
        f"{subject(TrainConfig)} `mptfoundry explain KEY` prints the same for one key, at any depth, and also"
        " explains the callbacks, loggers and algorithms that come from Composer.",
        "In a path, `*` is a name of your choice and `[N]` an entry of a list.",
    ]
    for title, cls in _sections():
        parts += [f"## {title}", "" if cls is TrainConfig else _prose(subject(cls)), _table(cls)]
    return "\n\n".join(part for part in parts if part) + "\n"


def cli_page() -> str:
    """All verbs of the command line, each with its options."""
    parts = [
        GENERATED,
        "# Command line",
        "Every option is a word `key=value`. `mptfoundry VERB --help` prints what stands here.",
    ]
    for name, verb in VERBS.items():
        does = f"{verb.does[0].upper()}{verb.does[1:]}."
        parts += [f"## {name}", _prose(does), f"```text\nmptfoundry {name} {verb.words}".rstrip() + "\n```"]
        parts.append(f"Example: `{verb.example}`")
        for options in verb.options:
            cls = getattr(verbs, options)
            parts += [cls.__doc__.splitlines()[0]] if len(verb.options) > 1 else []
            parts.append(_table(cls))
    return "\n\n".join(parts) + "\n"


def reliability_page() -> str:
    """The page on reliability, with a row for each of the tests' `FAULTS`: fault, how, outcome."""
    rows = ["| fault | how, and how often | outcome | test, in `tests/` |", "|---|---|---|---|"]
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FAULTS":
                cells = (" | ".join(row) for row in ast.literal_eval(node.value))
                rows += [f"| {each} | `{path.relative_to(ROOT / 'tests')}` |" for each in cells]
    page = (ROOT / "docs" / "internals" / "reliability.md").read_text()
    return TABLE.sub(lambda match: f"{match[1]}\n" + "\n".join(rows) + f"\n\n{match[2]}", page)


def _sections() -> Iterator[tuple[str, type]]:
    """Title and class of each section, each class once, in the order of the config."""
    yield "The top level", TrainConfig
    titles: dict[type, str] = {}
    names: dict[str, str] = {}  # of the section that stands at a path, as the walk meets it
    for path, cls, _ in walk_keys(TrainConfig):
        section = path.rpartition(".")[0]
        if name := section_name(cls):
            names[section] = name
        if not section or cls in titles:
            continue
        above = next((names[p] for p in names if section.startswith(f"{p}.") and name is None), None)
        titles[cls] = f"{section} (name: {name})" if name else f"{section} (of {above})" if above else section
    yield from ((title, cls) for cls, title in titles.items())


def _table(cls: type) -> str:
    """The keys of a section, without those that it has from another section's class."""
    known = [base for base in cls.__mro__[1:] if is_dataclass(base) and section_name(base)]
    inherited = {field.name for base in known for field in fields(base)} - {"name"}
    rows = [f"All keys of `name: {section_name(base)}`, and:\n" for base in known[:1]]
    rows += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for field in fields(cls):
        if field.name in inherited:
            continue
        annotation = field_types(cls)[field.name]
        meaning = meanings(cls).get(field.name, "")
        cells = (f"`{field.name}`", _prose(describe(annotation)), _default(field), _prose(meaning))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def _default(field: Any) -> str:
    default = default_of(field)
    if default is MISSING:
        return "required"
    return "its keys' defaults" if is_dataclass(default) else f"`{show(default)}`"


def _prose(text: str) -> str:
    """Text that Markdown shows as it is: brackets and stars outside of code are plain."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([*_<\[\]])", r"\\\1", p) for p in pieces)


if __name__ == "__main__":
    from words import given_words

    main(given_words(__doc__))
