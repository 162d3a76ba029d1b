"""Names and locations of runs and checkpoints: paths on this machine, or URLs of an object store.

The same function distinguishes URLs from paths everywhere. Paths are taken literally: `#`, `?`, `;`, `%` and
`:` are ordinary characters.
"""

from __future__ import annotations

import re
from pathlib import Path

# Databricks writes `dbfs:/` with a single slash.
_URL = re.compile(r"[A-Za-z][\w+.-]*://|dbfs:/")
_PROGRESS = re.compile(r"ep(?P<epoch>\d+)-ba(?P<batch>\d+)(-rank\d+)?(\.pt)?")
_LONGEST_NAME = 255


def is_url(place: str | Path) -> bool:
    """Whether a location is a URL of an object store, not a path on this machine."""
    return isinstance(place, str) and _URL.match(place) is not None


def path_of(place: str | None) -> Path | None:
    """Return a location on this machine as a path; None for a URL."""
    return None if place is None or is_url(place) else Path(place).expanduser()


def path_in_store(url: str) -> str:
    """Return the path of a URL below its bucket, unchanged."""
    if "://" not in url:
        return url.partition(":")[2].lstrip("/")
    return url.partition("://")[2].partition("/")[2].lstrip("/")


def progress_of(path: Path) -> tuple[int, int] | None:
    """Return the epoch and batch in a checkpoint's name, or None."""
    match = _PROGRESS.fullmatch(path.name)
    return (int(match["epoch"]), int(match["batch"])) if match else None


def why_not_a_run_name(name: str) -> str | None:
    """Say why a run can't have this name, such as that its folder would be somewhere else."""
    if not name:
        return "is empty. Name the run's folder."
    if problem := why_not_a_path(name):
        return problem
    if "{" in name or "}" in name:
        return f"{name} contains a brace, which marks a placeholder. Remove it."
    if any(part in ("", ".", "..") for part in name.split("/")):
        return f"{name} has an empty part, `.` or `..` between slashes. Use a plain name such as my-run."
    return None


def why_not_a_path(path: str) -> str | None:
    """Say why no file can have this name."""
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in path):
        return f"{path[:80]!r} holds a control character. Remove it."
    if any(len(part.encode("utf-8", "replace")) > _LONGEST_NAME for part in path.split("/")):
        return f"{path[:40]}... is too long. A name has at most {_LONGEST_NAME} bytes."
    return None


def why_no_start_finds(filename: str, *, in_a_store: bool) -> str | None:
    """Say why no start would find a checkpoint of this name, after `{batch}` and the like are filled in."""
    name = re.sub(r"\{[^}]*\}", "0", filename)
    tells_batch = progress_of(Path(name)) is not None and "{batch}" in filename
    if name.startswith(".") or not (tells_batch or name.endswith(".pt")):
        return f"{filename} would not be found again. Use a name that ends in .pt and has no leading dot."
    if in_a_store and not tells_batch:
        return f"{filename} has no batch number. In a store use ep{{epoch}}-ba{{batch}}-rank{{rank}}.pt."
    return None
