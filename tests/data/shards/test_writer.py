from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mptfoundry.data.shards.index import META_KEY, PREPARING, ShardMeta
from mptfoundry.data.shards.writer import HASHES, ShardWriter
from mptfoundry.errors import DataError

META = ShardMeta("t", "f", 300, 8, 0, 1, 100, 800, 9, 3, {}, {})


def write(
    folder: Path, tokens: np.ndarray, *, compression: str | None, shard_bytes: int = 1500
) -> ShardWriter:
    folder.mkdir()
    writer = ShardWriter(
        folder, dtype="uint16", max_seq_len=8, shard_bytes=shard_bytes, compression=compression
    )
    data = tokens.astype(np.uint16).tobytes()
    for start in range(0, len(data), 446):
        writer.add(data[start : start + 446])
    return writer


@pytest.mark.parametrize("compression", [None, "zstd:7"])
def test_shards_have_the_bytes_that_streamings_writer_gives(tmp_path: Path, compression: str | None) -> None:
    from streaming import MDSWriter

    tokens = np.random.default_rng(0).integers(0, 300, (100, 8))
    with MDSWriter(
        columns={"tokens": "ndarray:uint16:8"},
        out=str(tmp_path / "theirs"),
        hashes=list(HASHES),
        size_limit=1500,
        compression=compression,
    ) as writer:
        for row in tokens:
            writer.write({"tokens": row.astype(np.uint16)})
    ours = write(tmp_path / "ours", tokens, compression=compression)
    assert ours.finish() == 0
    ours.write_index(META)
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert len(names) > 2
    for name in names:
        if name != "index.json":
            assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    index = json.loads((tmp_path / "ours" / "index.json").read_text())
    assert index.pop(META_KEY)["vocab_size"] == 300
    assert index == json.loads((tmp_path / "theirs" / "index.json").read_text())


def test_what_fills_no_sample_is_left_over(tmp_path: Path, read_tokens: Callable[[Path], np.ndarray]) -> None:
    writer = write(tmp_path / "x", np.arange(8 * 60 + 5), compression=None)
    assert writer.finish() == 5 * 2
    writer.write_index(dataclasses.replace(META, samples=60))
    assert (read_tokens(tmp_path / "x").ravel() == np.arange(8 * 60)).all()
    assert not list((tmp_path / "x").rglob("*.part")) and not (tmp_path / "x" / PREPARING).exists()


def test_a_shard_too_small_for_a_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"shard_bytes: 100 can't hold shards of 8 tokens\. Use \d+ to 4294967295"
    ):
        write(tmp_path / "x", np.arange(8), compression=None, shard_bytes=100)
