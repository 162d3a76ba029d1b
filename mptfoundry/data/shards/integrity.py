"""Check shard files against their index: always by size, and by hash if the index has hashes.

An *entry* describes one file in `index.json`: `basename`, `bytes` and `hashes` (algorithm -> hex digest).
A *problem* says what is wrong with a file, as a predicate that follows the file's name.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from mptfoundry.errors import DataError

MISSING = "is missing"
# Fastest first. All of them detect accidental damage.
FASTEST_HASHES = ("xxh3_64", "xxh3_128", "xxh128", "xxh64", "xxh32", "sha1", "blake2b", "md5", "sha256")
READ_BYTES = 1 << 22
MOST_PROBLEMS_NAMED = 5
STILL_WRITTEN_SECONDS = 3.0
SECONDS_BETWEEN_LOOKS = 0.1
# Streaming's compression names -> pyarrow's.
CODECS = {"br": "brotli", "bz2": "bz2", "gz": "gzip", "snappy": "snappy", "zstd": "zstd"}

Item = TypeVar("Item")


def fastest_hash(hashes: Mapping[str, str]) -> str | None:
    """Return the fastest known algorithm among an entry's hashes; None if there is none."""
    known = [name for name in FASTEST_HASHES if name in hashes]
    others = [name for name in sorted(hashes) if name in hashlib.algorithms_available]
    return next(iter(known + others), None)


def problem_of(path: Path, entry: Mapping[str, Any], algorithm: str | None) -> str | None:
    """Say what is wrong with a file; None if its size matches, and its hash if `algorithm` is given."""
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"has {size:,} bytes, and its index says {entry['bytes']:,}"
        if algorithm is None:
            return None
        digest = digest_of(path, algorithm)
    except FileNotFoundError:
        return MISSING
    except OSError as error:
        return f"can't be read ({error.strerror or error})"
    if digest != entry["hashes"][algorithm]:
        return f"is damaged: its {algorithm} is not what its index says"
    return None


def digest_of(path: Path, algorithm: str) -> str:
    """Hash a file's content, as hex digits."""
    is_xxhash = algorithm in xxhash.algorithms_available
    digest: Any = getattr(xxhash, algorithm)() if is_xxhash else hashlib.new(algorithm)
    with path.open("rb", buffering=0) as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return str(digest.hexdigest())


def entry_of(path: Path) -> dict[str, Any]:
    """Create the index entry of a file, with the fastest hash."""
    algorithm = FASTEST_HASHES[0]
    hashes = {algorithm: digest_of(path, algorithm)}
    return {"basename": path.name, "bytes": path.stat().st_size, "hashes": hashes}


def wait_for_writer(path: Path, size: int) -> None:
    """Wait while another process writes a file, until it has `size` bytes or stops growing."""
    try:
        while (now := path.stat()).st_size < size and abs(time.time() - now.st_mtime) < STILL_WRITTEN_SECONDS:
            time.sleep(SECONDS_BETWEEN_LOOKS)
    except FileNotFoundError:
        pass


def unpack(compression: str, data: bytes, size: int) -> bytes:
    """Decompress data to exactly `size` bytes, without using more memory than that.

    Raises:
        ValueError: The data has another size, or is not in this format.
    """
    import pyarrow

    name = CODECS[compression.split(":")[0]]
    try:
        if name == "snappy":
            if _snappy_length(data) != size:
                raise ValueError(f"it doesn't hold the {size:,} bytes that its index states")
            raw = pyarrow.decompress(data, decompressed_size=size, codec=name, asbytes=True)
        else:
            with pyarrow.CompressedInputStream(io.BytesIO(data), name) as file:
                raw = file.read(size + 1)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"it is not {compression} data ({error})") from error
    if len(raw) != size:
        raise ValueError(f"it doesn't hold the {size:,} bytes that its index states")
    return raw


def _snappy_length(data: bytes) -> int:
    """Read the uncompressed length before the data: a little-endian varint."""
    length = 0
    for place, byte in enumerate(data[:5]):
        length |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return length
    return -1


def problems_of(
    items: Iterable[Item], look: Callable[[Item], str | None], size_of: Callable[[Item], int], *, title: str
) -> list[tuple[Item, str]]:
    """Check many files, in threads since hashing releases the GIL, and return the items with problems.

    `look` returns an item's problem or None. A progress bar with this title, if it isn't empty, counts bytes.
    """
    from tqdm import tqdm  # slow to import, and reading an index doesn't need it

    items = list(items)
    problems = []
    with (
        ThreadPoolExecutor(min(32, len(os.sched_getaffinity(0)))) as pool,
        tqdm(total=sum(map(size_of, items)), desc=title, unit="B", unit_scale=True, disable=not title) as bar,
    ):
        for item, problem in zip(items, pool.map(look, items), strict=True):
            bar.update(size_of(item))
            if problem is not None:
                problems.append((item, problem))
    return problems


def refuse(where: str, problems: Iterable[str]) -> None:
    """Raise DataError with the first few problems, if any. Each is a file name and what is wrong with it."""
    lines = [f"{where}: {problem}." for problem in problems]
    if lines:
        more = len(lines) - MOST_PROBLEMS_NAMED
        rest = [f"{where}: {more:,} more files are missing or damaged."] if more > 0 else []
        raise DataError("\n".join([*lines[:MOST_PROBLEMS_NAMED], *rest]) + " Copy or prepare them again.")
