"""Checksums of checkpoints: which of their bytes are not those that were written.

A file of `torch.save` is a zip archive, which holds the CRC-32 of everything in it. A folder of shards gets
`checksums.json`, the size and the CRC-32 of each of its files. A *part* is a member of such a file, or a file
of such a folder: what one rank checks while others check the rest.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from mptfoundry.checkpoints.folders import confined, read_json
from mptfoundry.errors import CheckpointError

CHECKSUMS = "checksums.json"
_BLOCK = 1 << 20
_THREADS = min(8, os.cpu_count() or 1)


def checksums_of(files: Sequence[Path]) -> dict[str, dict[str, int | str]]:
    """Size in bytes and CRC-32 of files, by name."""
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(_checksum, files)
        return {
            file.name: {"bytes": size, "crc32": crc} for file, (size, crc) in zip(files, sums, strict=True)
        }


def write_checksums(folder: Path, files: dict[str, dict[str, int | str]]) -> None:
    """Add `checksums.json` to a folder of shards."""
    (folder / CHECKSUMS).write_text(json.dumps({"files": files}, indent=1, sort_keys=True))


def parts_of(checkpoint: Path) -> list[str]:
    """The parts of a checkpoint that have checksums; none for shards that another program wrote."""
    if checkpoint.is_file():
        with zipfile.ZipFile(checkpoint) as archive:
            return archive.namelist()
    return sorted(_written(checkpoint)) if (checkpoint / CHECKSUMS).exists() else []


def why_damaged(checkpoint: Path, parts: Sequence[str]) -> str | None:
    """Which of some parts holds other bytes than were written, and in which file; None if none does."""
    check = _why_member_is_damaged if checkpoint.is_file() else _why_file_is_damaged
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda part: check(checkpoint, part), parts)
        return next((reason for reason in found if reason is not None), None)


def _why_member_is_damaged(file: Path, member: str) -> str | None:
    try:
        with zipfile.ZipFile(file) as archive, archive.open(member) as stream:
            for _ in _blocks(stream):
                pass
    except Exception as error:  # a damaged archive fails in any way
        return f"damaged, {member} holds other bytes than were written ({error})"
    return None


def _why_file_is_damaged(folder: Path, name: str) -> str | None:
    wanted = _written(folder)[name]
    try:
        size, crc = _checksum(confined(folder, name, folder / CHECKSUMS))
    except CheckpointError as error:
        return str(error).rstrip(".")
    if {"bytes": size, "crc32": crc} == wanted:
        return None
    return f"damaged, {name} holds other bytes than were written (its CRC-32 is {crc})"


def _written(folder: Path) -> dict[str, dict[str, int | str]]:
    files = read_json(folder, CHECKSUMS).get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{folder / CHECKSUMS}: damaged, it names no files.")
    return files


def _checksum(file: Path) -> tuple[int, str]:
    size = crc = 0
    with file.open("rb") as stream:
        for block in _blocks(stream):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, f"{crc:08x}"


def _blocks(stream: IO[bytes]) -> Iterator[bytes]:
    while block := stream.read(_BLOCK):
        yield block
