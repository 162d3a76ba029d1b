"""Files of a folder that anyone may have made: each lies in that very folder, and small ones are small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mptfoundry.errors import CheckpointError

_LARGEST_JSON = 1 << 26


def confined(folder: Path, name: str, named_by: Path) -> Path:
    """The file `name` of `folder`; raises CheckpointError unless it lies in that very folder.

    Links may lead to files of the same folder, and from a snapshot in the hub's cache to the blobs beside it.
    """
    if Path(name).name != name or name in ("", ".", "..") or "\\" in name or "\0" in name:
        raise CheckpointError(
            f"{named_by}: refused, since it names {name!r}, which is not a file of its own folder."
        )
    file = folder / name
    if not file.is_file():
        raise CheckpointError(f"{folder}: {name} is missing, which {named_by.name} names.")
    home = folder.resolve()
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if file.resolve().parent not in homes:
        raise CheckpointError(
            f"{file}: refused, since it is a link to {file.resolve()}, outside of its folder. Put the file "
            "itself there."
        )
    return file


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The content of a JSON file of `folder` that holds a dictionary.

    Raises:
        CheckpointError: It is missing, lies elsewhere, is damaged, or no dictionary.
    """
    if not (folder / name).exists():
        raise CheckpointError(f"{folder}: {name} is missing.")
    file = confined(folder, name, folder / name)
    try:
        if file.stat().st_size > _LARGEST_JSON:
            raise CheckpointError(f"{file}: refused, since it is larger than {_LARGEST_JSON:,} bytes.")
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{file}: can't be read ({error}).") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: not a dictionary.")
    return values
