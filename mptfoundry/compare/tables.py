"""Plain text tables, and short names for places."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_WIDEST_CELL = 48


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, left: int = 1) -> str:
    """Rows under a head; the first `left` columns are aligned on the left, the others on the right."""
    cells = [[_cell(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def number(value: float | None) -> str:
    """A measured value, or a dash."""
    return "-" if value is None else f"{value:.4f}"


def _cell(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= _WIDEST_CELL else text[: _WIDEST_CELL - 3] + "..."


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as distinguish it from the others."""
    parts = [path.resolve().parts for path in paths]
    longest = max(map(len, parts))
    for count in range(1, longest + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def differences(settings: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """A table of the keys whose values are not the same everywhere; empty if there are none."""
    keys = sorted({key for each in settings for key in each})
    # A section that only some have is shown by its keys.
    keys = [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]
    rows = [(key, *(each.get(key) for each in settings)) for key in keys]
    different = [row for row in rows if any(value != row[1] for value in row[2:])]
    return table(("", *names), different) if different else ""
