"""Write MDS shards of token ids: the same bytes as streaming's MDSWriter, each file whole or absent.

MDSWriter can neither continue where a killed run stopped nor write a file in one move, and it takes samples
one by one. Here every sample has the same size, so a shard is its header and a slice of the token stream.
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
    """Cut a stream of ids into samples of `max_seq_len` and write them to `folder`, shard by shard.

    Args:
        folder: Where the shards go.
        dtype: Unsigned integer type of the ids.
        max_seq_len: Tokens in a sample.
        shard_bytes: The most bytes in a shard, before compression.
        compression: One of streaming's, such as `zstd` or `zstd:7`; None for none.

    Attributes:
        announce: Called with the name of each file before it appears in the folder.
        shards: Entries of the shards written so far, for the index.
        pending: Bytes of the ids that are in no shard yet.

    Raises:
        DataError: `shard_bytes` holds no sample or exceeds what MDS can hold.
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
        """Append ids to the stream; write the shards that become full."""
        self.pending += ids
        full = self.samples_per_shard * self.sample_bytes
        while len(self.pending) >= full:
            self._write_shard(bytes(memoryview(self.pending)[:full]))
            del self.pending[:full]

    def finish(self) -> int:
        """Write the last shard.

        Returns:
            How many bytes of ids are left over after the last whole sample.
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
    """Write a file so that it is never seen half: under another name, flushed to disk, then renamed."""
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
    # Importing streaming takes seconds, which only compression needs to spend.
    from streaming.base.compression import compress, get_compression_extension

    return compress(compression, data), f"{name}.{get_compression_extension(compression)}"
