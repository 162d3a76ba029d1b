"""Append-only files that can be restored to a saved state."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from mptfoundry.data.shards.integrity import READ_BYTES


class AppendedFiles:
    """Files in a folder that a sink appends to.

    Args:
        folder: The folder; created if missing.
        names: The file names.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, BinaryIO] = {}
        self._hashes: dict[str, Any] = {name: xxhash.xxh3_64() for name in names}

    def append(self, name: str, data: bytes) -> None:
        """Append to a file; the first call overwrites an existing file unless it was restored."""
        if name not in self._files:
            self._files[name] = (self.folder / name).open("wb", 1 << 20)
        self._files[name].write(data)
        self._hashes[name].update(data)

    def state(self) -> dict[str, Any]:
        """Flush all files to disk and return their sizes and hashes."""
        state = {}
        for name, digest in self._hashes.items():
            self.append(name, b"")
            self._files[name].flush()
            os.fsync(self._files[name].fileno())
            state[name] = {"bytes": self._files[name].tell(), "xxh3_64": digest.hexdigest()}
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Truncate each file to its saved size. Raises ValueError or OSError if a file is damaged."""
        for name in self._hashes:
            path, left = self.folder / name, int(state[name]["bytes"])
            digest = xxhash.xxh3_64()
            with path.open("rb") as file:
                while left and (block := file.read(min(left, READ_BYTES))):
                    digest.update(block)
                    left -= len(block)
            if left or digest.hexdigest() != state[name]["xxh3_64"]:
                raise ValueError(f"{path} is damaged")
            os.truncate(path, state[name]["bytes"])
            self._files[name] = path.open("ab", 1 << 20)
            self._hashes[name] = digest

    def close(self) -> None:
        """Write everything and close the files."""
        for name in self._hashes:
            self.append(name, b"")
            self._files[name].close()
