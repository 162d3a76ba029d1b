"""Where things lie and what they are called: paths of this machine or URLs of a store, runs, checkpoints.

One function tells a URL from a path, everywhere. A path is taken as it is written: `#`, `?`, `;`, `%` and `:`
are letters in it.
"""

from __future__ import annotations

import re
from pathlib import Path

# Databricks writes its own without the second slash.
_URL = re.compile(r"[A-Za-z][\w+.-]*://|dbfs:/")
_PROGRESS = re.compile(r"ep(?P<epoch>\d+)-ba(?P<batch>\d+)(-rank\d+)?(\.pt)?")
_LONGEST_NAME = 255


def is_url(place: str | Path) -> bool:
    """Whether a place is the URL of something in a store, and not a path of this machine."""
    return isinstance(place, str) and _URL.match(place) is not None


def path_of(place: str | None) -> Path | None:
    """A place on this machine as a path; None for a URL."""
    return None if place is None or is_url(place) else Path(place).expanduser()


def path_in_store(url: str) -> str:
    """The path of a URL below its bucket, as it is written."""
    if "://" not in url:
        return url.partition(":")[2].lstrip("/")
    return url.partition("://")[2].partition("/")[2].lstrip("/")


def progress_of(path: Path) -> tuple[int, int] | None:
    """Epochs and batches that a checkpoint's name tells, or None."""
    match = _PROGRESS.fullmatch(path.name)
    return (int(match["epoch"]), int(match["batch"])) if match else None


def why_not_a_run_name(name: str) -> str | None:
    """Why a run can't be called so: its folder would lie elsewhere, or nowhere."""
    if not name:
        return "is empty. Name the run's folder."
    if problem := why_not_a_path(name):
        return problem
    if "{" in name or "}" in name:
        return f"{name} holds a brace, which stands for something to fill in. Remove it."
    if any(part in ("", ".", "..") for part in name.split("/")):
        return f"{name} has an empty part, `.` or `..` between slashes. Use a plain name such as my-run."
    return None


def why_not_a_path(path: str) -> str | None:
    """Why no file can be called so."""
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in path):
        return f"{path[:80]!r} holds a control character. Remove it."
    if any(len(part.encode("utf-8", "replace")) > _LONGEST_NAME for part in path.split("/")):
        return f"{path[:40]}... is too long. A name has at most {_LONGEST_NAME} bytes."
    return None


def why_no_start_finds(filename: str, *, in_a_store: bool) -> str | None:
    """Why no start would find a checkpoint of this name, where `{batch}` and the like are filled in."""
    name = re.sub(r"\{[^}]*\}", "0", filename)
    tells_batch = progress_of(Path(name)) is not None and "{batch}" in filename
    if name.startswith(".") or not (tells_batch or name.endswith(".pt")):
        return (
            f"{filename} is not a name that a start finds. Use one that ends in .pt, without a leading dot."
        )
    if in_a_store and not tells_batch:
        return f"{filename} does not tell the batch. In a store use ep{{epoch}}-ba{{batch}}-rank{{rank}}.pt."
    return None
