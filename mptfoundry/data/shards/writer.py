"""Write MDS shards of token ids atomically, with the same bytes as streaming's MDSWriter.

MDSWriter can't resume after a kill, does not write files atomically, and takes samples one at a time. Here
every sample has the same size, so a shard is a header and a slice of the token stream.
Format: https://docs.mosaicml.com/projects/streaming (MDS, version 2).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mptfoundry.data.shards.index import INDEX, LARGEST_SHARD, META_KEY, PREPARING, ShardMeta
from mptfoundry.errors import DataError

HASHES = ("sha1", "xxh64")


class ShardWriter:
    """Cuts a stream of ids into samples of `max_seq_len` tokens and writes them to shards.

    Args:
        folder: Where to write the shards.
        dtype: Unsigned integer type of the ids.
        max_seq_len: Tokens per sample.
        shard_bytes: Maximum bytes in a shard, before compression.
        compression: A compression of streaming, such as `zstd` or `zstd:7`, or None.

    Attributes:
        announce: Called with the name of each file before it appears in the folder.
        shards: Index entries of the shards written so far.
        pending: Bytes of the ids that are not in a shard yet.

    Raises:
        DataError: `shard_bytes` is too small for one sample or larger than MDS allows.
    """

    def __init__(
        self, folder: Path, *, dtype: str, max_seq_len: int, shard_bytes: int, compression: str | None
    ) -> None:
        self.folder = folder
        self.sample_bytes = max_seq_len * np.dtype(dtype).itemsize
        self.config = {
            "version": 2,
            "format": "mds",
            "compression": compression,
            "hashes": list(HASHES),
            "size_limit": shard_bytes,
            "column_names": ["tokens"],
            "column_encodings": [f"ndarray:{dtype}:{max_seq_len}"],
            "column_sizes": [self.sample_bytes],
        }
        self.config_text = json.dumps(self.config, sort_keys=True).encode()
        room = shard_bytes - 8 - len(self.config_text)
        self.samples_per_shard = room // (self.sample_bytes + 4)
        if self.samples_per_shard < 1 or shard_bytes > LARGEST_SHARD:
            smallest = 8 + len(self.config_text) + self.sample_bytes + 4
            raise DataError(
                f"shard_bytes: {shard_bytes} can't hold shards of {max_seq_len} tokens. "
                f"Use {smallest} to {LARGEST_SHARD}; 67108864 (64 MiB) is usual."
            )
        self.announce: Callable[[str], None] = lambda name: None
        self.shards: list[Mapping[str, Any]] = []
        self.pending = bytearray()

    def add(self, ids: bytes) -> None:
        """Append ids to the stream, and write any shards that are full."""
        self.pending += ids
        full = self.samples_per_shard * self.sample_bytes
        while len(self.pending) >= full:
            self._write_shard(bytes(memoryview(self.pending)[:full]))
            del self.pending[:full]

    def finish(self) -> int:
        """Write the last shard.

        Returns:
            How many bytes of ids are left after the last full sample.
        """
        whole = len(self.pending) // self.sample_bytes * self.sample_bytes
        if whole:
            self._write_shard(bytes(memoryview(self.pending)[:whole]))
        return len(self.pending) - whole

    def write_index(self, meta: ShardMeta) -> None:
        """Write `index.json`, which completes the folder."""
        content = {"version": 2, "shards": self.shards, META_KEY: meta.to_json()}
        self._write(INDEX, json.dumps(content, sort_keys=True).encode())

    def _write_shard(self, ids: bytes) -> None:
        samples = len(ids) // self.sample_bytes
        start = 8 + 4 * samples + len(self.config_text)
        offsets = start + np.arange(samples + 1, dtype=np.int64) * self.sample_bytes
        header = np.uint32(samples).tobytes() + offsets.astype(np.uint32).tobytes() + self.config_text
        raw = header + ids
        name = f"shard.{len(self.shards):05}.mds"
        raw_entry, zip_entry, data = _entry(name, raw), None, raw
        if self.config["compression"]:
            data, name = _compress(str(self.config["compression"]), raw, name)
            zip_entry = _entry(name, data)
        self._write(name, data)
        self.shards.append({"samples": samples, "raw_data": raw_entry, "zip_data": zip_entry, **self.config})

    def _write(self, name: str, data: bytes) -> None:
        self.announce(name)
        write_whole(self.folder / name, data)


def write_whole(path: Path, data: bytes | bytearray) -> None:
    """Write a file atomically: under a temporary name, flushed to disk, then renamed."""
    preparing = path.parent / PREPARING
    staging = (preparing if preparing.is_dir() else path.parent) / f"{path.name}.part"
    with staging.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    staging.replace(path)


def _entry(name: str, data: bytes) -> dict[str, Any]:
    digests = {"sha1": hashlib.sha1(data).hexdigest(), "xxh64": xxhash.xxh64(data).hexdigest()}
    return {"basename": name, "bytes": len(data), "hashes": digests}


def _compress(compression: str, data: bytes, name: str) -> tuple[bytes, str]:
    # Importing streaming takes seconds, and only compression needs it.
    from streaming.base.compression import compress, get_compression_extension

    return compress(compression, data), f"{name}.{get_compression_extension(compression)}"
