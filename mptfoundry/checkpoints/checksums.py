"""Checksums of models on disk: which bytes differ from those that were written.

A file written by `torch.save` is a zip archive, which holds the CRC-32 of everything in it; the pieces in the
files of a sharded checkpoint are such archives, too. Folders get a `checksums.json`: the size and the CRC-32
of its files, or of its tensors by name. A *part* is a member of such a file, or a file of such a folder: one
rank checks it while other ranks check the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mptfoundry.errors import CheckpointError
from mptfoundry.files import confined, read_json

CHECKSUMS = "checksums.json"
ADVICE = (
    "Restore it from another copy. verify=false makes export, import, eval, generate and chat read it anyway."
)
_BLOCK = 1 << 20
_THREADS = min(8, os.cpu_count() or 1)
_LOCAL_HEADER = 30
# A file that people edit on purpose, but that decides how the weights compute.
_TEXTS = ("config.json",)
_SHA256 = re.compile("[0-9a-f]{64}")
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".distcp")

Sums = dict[str, dict[str, int | str]]


class Verifier:
    """Compares what is read from one model with its checksums: each member once, when it is first read.

    Attributes:
        is_on: Whether anything is compared.
        notes: What has no checksums, and texts that were changed, as sentences for the user.
    """

    def __init__(self, *, is_on: bool = True) -> None:
        self.is_on = is_on
        self.notes: list[str] = []
        self._compared: set[tuple[Path, str]] = set()

    def once(self, file: Path, member: str, why_damaged: Callable[[], str | None]) -> None:
        """Call `why_damaged` if this member was not compared yet; raise CheckpointError with its answer."""
        if not self.is_on or (file, member) in self._compared:
            return
        if reason := why_damaged():
            raise CheckpointError(f"{file}: {reason}. {ADVICE}")
        self._compared.add((file, member))

    def note(self, sentence: str) -> None:
        """Add a note for the user, unless comparison is off."""
        if self.is_on and sentence not in self.notes:
            self.notes.append(sentence)


@dataclass(frozen=True)
class Member:
    """The position of a member's bytes in an archive, and their CRC-32."""

    name: str
    offset: int
    size: int
    crc: int


def members_of(file: Path) -> list[Member]:
    """List the members of an archive that hold tensors, at the offsets that the archive itself records."""
    with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
        members = []
        for info in archive.infolist():
            if _is_tensor(info.filename):
                stream.seek(info.header_offset)
                lengths = struct.unpack("<HH", stream.read(_LOCAL_HEADER)[-4:])
                offset = info.header_offset + _LOCAL_HEADER + sum(lengths)
                members.append(Member(info.filename, offset, info.file_size, info.CRC))
        return members


def has_checksums(file: Path | IO[bytes]) -> bool:
    """Whether an archive holds checksums; torch can leave them out, and then all of them are 0."""
    with zipfile.ZipFile(file) as archive:
        return any(info.CRC for info in archive.infolist())


def outline_parts(file: Path) -> list[str]:
    """List the members of a file of `torch.save` that are not tensors: names, shapes, plain values."""
    with zipfile.ZipFile(file) as archive:
        return [name for name in archive.namelist() if not _is_tensor(name)]


def why_other_bytes(name: str, content: Any, crc: int) -> str | None:
    """Say whether the CRC-32 of `content`, anything with a buffer, differs from `crc`; None if not."""
    found = zlib.crc32(content)
    return None if found == crc else _other_bytes(name, f"its CRC-32 is {found:08x}")


def why_piece_is_damaged(name: str, piece: IO[bytes]) -> str | None:
    """The same for a whole archive of `torch.save` inside another file."""
    try:
        if not has_checksums(piece):
            return None
        with zipfile.ZipFile(piece) as archive:
            for member in archive.namelist():
                with archive.open(member) as stream:
                    for _ in _blocks(stream):
                        pass
    except Exception as error:  # a damaged archive can fail in any way
        return _other_bytes(name, str(error))
    finally:
        piece.seek(0)
    return None


def checksums_of(files: Sequence[Path]) -> Sums:
    """Return size in bytes and CRC-32 of files, by name."""
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(_checksum, files)
        return {
            file.name: {"bytes": size, "crc32": crc} for file, (size, crc) in zip(files, sums, strict=True)
        }


def write_checksums(folder: Path, files: Sums) -> None:
    """Add `checksums.json` to a folder of shards."""
    _write(folder, {"files": files})


def write_tensor_checksums(folder: Path, crcs: Mapping[str, int]) -> None:
    """Add `checksums.json` to a folder of safetensors: the CRC-32 of each tensor, by its stored name.

    It also covers `config.json`, if there is one.
    """
    files = checksums_of([file for name in _TEXTS if (file := folder / name).exists()])
    _write(folder, {"files": files, "tensors": {name: f"{crc:08x}" for name, crc in crcs.items()}})


def tensor_checksums(folder: Path) -> dict[str, int] | None:
    """Read the CRC-32 of each tensor of a folder by its stored name; None if the folder has none.

    Raises:
        CheckpointError: They are damaged.
    """
    if not (folder / CHECKSUMS).exists():
        return None
    written = read_json(folder, CHECKSUMS).get("tensors")
    try:
        return {str(name): int(crc, 16) for name, crc in written.items()}  # type: ignore[union-attr]
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / CHECKSUMS}: damaged, it holds no checksums of tensors. Remove it to read the folder "
            "unverified."
        ) from error


def changed_texts(folder: Path) -> list[str]:
    """List the texts of a folder with checksums that have changed since they were written."""
    if not (folder / CHECKSUMS).exists():
        return []
    written = read_json(folder, CHECKSUMS).get("files")
    names = [name for name in _TEXTS if isinstance(written, dict) and name in written]
    return [name for name in names if why_file_is_damaged(folder, name) is not None]


def hub_digest(file: Path) -> str | None:
    """Return the sha256 that the hub's client keeps for a file that it downloaded; None if it has none.

    In the hub's cache it is the name of the file's blob. For other files it is in a metadata file, which is
    valid as long as nobody has written to the file since.
    """
    blob = file.resolve()
    if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name
    note = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    try:
        _, etag, fetched_at = note.read_text(encoding="utf-8").split()
        is_as_fetched = file.stat().st_mtime - 1 <= float(fetched_at)
    except (OSError, ValueError):
        return None
    return etag if is_as_fetched and _SHA256.fullmatch(etag) else None


def why_other_digest(file: Path, digest: str) -> str | None:
    """Say whether the sha256 of a file differs from `digest`; None if not."""
    sha256 = hashlib.sha256()
    with file.open("rb") as stream:
        for block in _blocks(stream):
            sha256.update(block)
    found = sha256.hexdigest()
    return None if found == digest else _other_bytes("it", f"its sha256 is {found[:16]}...")


def parts_of_archive(file: Path) -> list[str]:
    """List the members of an archive, if it holds checksums."""
    with zipfile.ZipFile(file) as archive:
        return archive.namelist() if has_checksums(file) else []


def parts_of_folder(folder: Path) -> list[str]:
    """List the files of a folder that have checksums."""
    return sorted(written_sums(folder)) if (folder / CHECKSUMS).exists() else []


def why_archive_is_damaged(file: Path, members: Sequence[str]) -> str | None:
    """Say which of some members of an archive differs from what was written; None if none does."""
    return _first_reason(_why_member_is_damaged, file, members)


def why_folder_is_damaged(folder: Path, names: Sequence[str]) -> str | None:
    """Say which of some files of a folder differs from what was written; None if none does."""
    return _first_reason(why_file_is_damaged, folder, names)


def _first_reason(
    why: Callable[[Path, str], str | None], checkpoint: Path, parts: Sequence[str]
) -> str | None:
    with ThreadPoolExecutor(_THREADS) as pool:
        reasons = pool.map(lambda part: why(checkpoint, part), parts)
        return next((reason for reason in reasons if reason is not None), None)


def why_file_is_damaged(folder: Path, name: str) -> str | None:
    """Say whether a file of a folder with checksums differs from what was written; None if not."""
    written = written_sums(folder).get(name)
    try:
        size, crc = _checksum(confined(folder, name, folder / CHECKSUMS))
    except CheckpointError as error:
        return str(error).rstrip(".")
    return None if {"bytes": size, "crc32": crc} == written else _other_bytes(name, f"its CRC-32 is {crc}")


def written_sums(folder: Path) -> Sums:
    """Read the sums of a folder's files from `checksums.json`."""
    files = read_json(folder, CHECKSUMS).get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{folder / CHECKSUMS}: damaged, it names no files.")
    return files


def _why_member_is_damaged(file: Path, member: str) -> str | None:
    try:
        with zipfile.ZipFile(file) as archive, archive.open(member) as stream:
            for _ in _blocks(stream):
                pass
    except Exception as error:  # a damaged archive can fail in any way
        return _other_bytes(member, str(error))
    return None


def _other_bytes(name: str, why: str) -> str:
    return f"damaged, {name} holds other bytes than were written ({why})"


def _write(folder: Path, content: Mapping[str, Any]) -> None:
    (folder / CHECKSUMS).write_text(json.dumps(content, indent=1, sort_keys=True))


def _is_tensor(member: str) -> bool:
    """Whether a member's name is one that `torch.save` gives to tensors: `archive/data/0`."""
    return member.count("/") == 2 and member.split("/")[1] == "data"


def _checksum(file: Path) -> tuple[int, str]:
    size = crc = 0
    with file.open("rb") as stream:
        for block in _blocks(stream):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, f"{crc:08x}"


def _blocks(stream: IO[bytes]) -> Iterator[bytes]:
    while block := stream.read(_BLOCK):
        yield block


def identity_of(path: Path) -> str:
    """A hash of a model's files: of their own checksums, or else of their sizes and times of change."""
    # Results may be written into the model's folder, too, and must not change what it is.
    files = sorted(each for each in path.iterdir() if _makes_the_model(each)) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                parts: Any = [(part.filename, part.file_size, part.CRC) for part in archive.infolist()]
        else:
            status = file.stat()
            parts = (file.name, status.st_size, status.st_mtime_ns)
        digest.update(repr(parts).encode())
    return digest.hexdigest()


def _makes_the_model(file: Path) -> bool:
    return file.suffix in _WEIGHT_FILES or file.name in (".metadata", "config.json", "adapter_config.json")
