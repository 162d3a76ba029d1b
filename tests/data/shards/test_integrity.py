from __future__ import annotations

import hashlib
import os
import time
import tracemalloc
from pathlib import Path

import pytest
from streaming.base.compression import compress, get_compressions
from streaming.base.hashing import get_hash, get_hashes

from mptfoundry.data.shards.integrity import fastest_hash, problem_of, unpack, wait_for_writer


@pytest.mark.parametrize("algorithm", sorted(get_hashes()))
def test_every_hash_of_streaming_is_compared(tmp_path: Path, algorithm: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789" * 1000)
    entry = {"bytes": 10_000, "hashes": {algorithm: get_hash(algorithm, path.read_bytes())}}
    assert fastest_hash(entry["hashes"]) == algorithm
    assert problem_of(path, entry, algorithm) is None
    path.write_bytes(b"0123456788" * 1000)
    assert problem_of(path, entry, algorithm) == f"is damaged: its {algorithm} is not what its index says"


def test_the_fastest_hash_is_taken_and_an_unknown_one_is_not() -> None:
    assert fastest_hash({"sha1": "", "xxh64": ""}) == "xxh64"
    assert fastest_hash({"crc99": "", "sha512": ""}) == "sha512"
    assert fastest_hash({"crc99": ""}) is None
    assert fastest_hash({}) is None


def test_sizes_and_absence_are_told_without_a_hash(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    entry = {"bytes": 4000, "hashes": {"sha1": hashlib.sha1(b"abc").hexdigest()}}
    assert problem_of(tmp_path / "file", entry, None) == "has 3 bytes, and its index says 4,000"
    assert problem_of(tmp_path / "gone", entry, "sha1") == "is missing"
    assert problem_of(tmp_path, {**entry, "bytes": tmp_path.stat().st_size}, "sha1") is not None


@pytest.mark.parametrize("compression", sorted(name for name in get_compressions() if ":" not in name))
def test_what_streaming_packed_is_unpacked(compression: str) -> None:
    data = os.urandom(1000) * 300
    packed = compress(compression, data)
    assert unpack(compression, packed, len(data)) == data
    for size in (len(data) - 1, len(data) + 1):
        with pytest.raises(ValueError, match=r"it doesn't hold the [\d,]+ bytes that its index states"):
            unpack(compression, packed, size)
    with pytest.raises(ValueError, match=r"it (is not|doesn't hold)"):
        unpack(compression, b"\x91" + packed[: len(packed) // 2], len(data))


@pytest.mark.parametrize("compression", sorted(name for name in get_compressions() if ":" not in name))
def test_a_bomb_is_refused_without_the_memory_that_it_wants(compression: str) -> None:
    bomb = compress(compression, bytes(1 << 25))
    import pyarrow

    tracemalloc.start()
    before = pyarrow.default_memory_pool().max_memory()
    with pytest.raises(ValueError, match="it doesn't hold the 1,000 bytes that its index states"):
        unpack(compression, bomb, 1000)
    assert tracemalloc.get_traced_memory()[1] < 1 << 23
    assert pyarrow.default_memory_pool().max_memory() - before < 1 << 23
    tracemalloc.stop()


def test_a_file_without_a_writer_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mptfoundry.data.shards.integrity.SECONDS_BETWEEN_LOOKS", None
    )  # nothing sleeps for None
    path = tmp_path / "file"
    path.write_bytes(b"half")
    os.utime(path, (time.time() - 60,) * 2)
    wait_for_writer(path, 8)
    wait_for_writer(tmp_path / "gone", 8)
