from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mptfoundry.data.shards.index import (
    check_shard_files,
    find_split,
    narrowest_dtype,
    read_index,
    read_samples,
)
from mptfoundry.errors import DataError

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    (
        "a shard index is wrong",
        "names outside the folder, impossible sizes",
        "refused before anything is downloaded",
    ),
]


def test_the_narrowest_type_holds_the_largest_id() -> None:
    sizes = (256, 257, 65_536, 65_537)
    assert [narrowest_dtype(size) for size in sizes] == ["uint8", "uint16", "uint16", "uint32"]


def test_the_index_tells_what_was_prepared(prepared: Path) -> None:
    index = read_index(prepared / "train", "here")
    assert index.meta is not None and index.meta.max_seq_len == 64
    assert index.samples == index.meta.samples == index.meta.tokens // 64
    assert len(index.shards) > 1


def test_samples_are_read_across_shards(prepared: Path) -> None:
    index = read_index(prepared / "train", "here")
    numbers = [0, index.samples // 2, index.samples - 1]
    samples = [sample["tokens"] for sample in read_samples(index, numbers)]
    everything = [sample["tokens"] for sample in read_samples(index, range(index.samples))]
    assert all((sample == everything[number]).all() for sample, number in zip(samples, numbers, strict=True))


def test_compressed_shards_are_read_without_leaving_files(tmp_path: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(columns={"tokens": "bytes"}, out=str(tmp_path / "x"), compression="zstd") as writer:
        writer.write({"tokens": np.arange(5, dtype=np.int64).tobytes()})
    before = sorted(path.name for path in (tmp_path / "x").iterdir())
    (sample,) = read_samples(read_index(tmp_path / "x", "here"), [0])
    assert np.frombuffer(sample["tokens"], np.int64).tolist() == [0, 1, 2, 3, 4]
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == before


def test_a_missing_folder_split_or_index_is_named(tmp_path: Path, prepared: Path) -> None:
    with pytest.raises(DataError, match=r"^loader: the folder .*nowhere is missing\. Prepare it"):
        find_split(tmp_path / "nowhere", None, "loader")
    with pytest.raises(DataError, match=r"has no split 'test'\. It has train, val\.$"):
        find_split(prepared, "test", "loader")
    with pytest.raises(
        DataError,
        match=r"^loader: split: train\[:50%\]: only data sets on the hub can .* Use train, ",
    ):
        find_split(prepared, "train[:50%]", "loader")
    with pytest.raises(DataError, match=r"holds splits, not shards\. Set split to one of train, val\.$"):
        read_index(prepared, "loader")
    with pytest.raises(DataError, match=r"has no index\.json\. Prepare it"):
        read_index(tmp_path, "loader")
    (tmp_path / ".preparing").mkdir()
    with pytest.raises(DataError, match=r"is half prepared\. Run the same `mptfoundry prepare` again"):
        read_index(tmp_path, "loader")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ('{"version": 2}', "is damaged"),
        ('{"version": 2, "shards": []}', r"holds no samples\. Prepare more text than max_seq_len tokens"),
        ('{"version": 2, "shards": [{"samples": 1}]}', "is damaged"),
    ],
)
def test_a_damaged_or_empty_index_is_one_error(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read_index(tmp_path, "loader")


def hostile(prepared: Path, folder: Path, **changes: Any) -> Path:
    """A folder with an index whose second shard says other things than it should."""
    index = json.loads((prepared / "train" / "index.json").read_text())
    shard = index["shards"][1]
    if "compression" in changes:
        shard["zip_data"] = dict(shard["raw_data"])
    for place, value in changes.items():
        part, _, key = place.rpartition("__")
        (shard[part] if part else shard)[key] = value
    folder.mkdir(exist_ok=True)
    (folder / "index.json").write_text(json.dumps(index))
    return folder


NAMES_ELSEWHERE = [
    *("../shard.00000.mds", "/etc/passwd", "..", ".", "", "a/../../b", "a//b", "index.json", "a\\..\\b"),
    "shard\0.mds",
]


@pytest.mark.parametrize("part", ["raw_data", "zip_data"])
@pytest.mark.parametrize("name", NAMES_ELSEWHERE)
def test_an_index_that_names_files_elsewhere_is_refused(
    tmp_path: Path, prepared: Path, name: str, part: str
) -> None:
    folder = hostile(prepared, tmp_path, compression="zstd", **{f"{part}__basename": name})
    with pytest.raises(DataError, match="is not a valid path for a shard inside the folder"):
        read_index(folder, "loader")


def test_an_index_may_name_files_in_folders_of_its_folder(tmp_path: Path, prepared: Path) -> None:
    """As streaming's merge_index writes them."""
    folder = hostile(prepared, tmp_path, raw_data__basename="part0/shard.00000.mds")
    assert read_index(folder, "loader").shards[1]["raw_data"]["basename"] == "part0/shard.00000.mds"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 10**15}, r"says that shard\.00001\.mds holds 1000000000000000 samples in \d+ bytes"),
        ({"samples": -5}, r"shards\[1\]: samples is -5, but must be a count\. Prepare or fetch"),
        ({"samples": 1.5}, "is damaged"),
        ({"samples": True}, "is damaged"),
        (
            {"column_names": ["tokens", "more"]},
            "column_encodings and column_sizes differ in length",
        ),
        ({"column_sizes": "x"}, "column_sizes is 'x', but must be a list of counts and null"),
        ({"version": 1}, "version is 1, but must be 2"),
        ({"license": "MIT"}, r"shards\[1\] has the unknown key 'license'"),
        ({"raw_data__bytes": "9" * 5000}, r"bytes is '9{55,60}\.\.\., but must be a count"),
        ({"raw_data__basename": "9" * 5000}, "which is longer than a file's name can be"),
        ({"samples": 1, "raw_data__bytes": 2**40}, "which is impossible"),
        ({"raw_data__bytes": "1e3"}, "is damaged"),
        ({"raw_data__bytes": -1}, "is damaged"),
        ({"raw_data__hashes": {"sha1": 5}}, "is damaged"),
        ({"raw_data__hashes": None}, "is damaged"),
        ({"zip_data__bytes": -1, "compression": "zstd"}, "is damaged"),
        ({"compression": None}, "names the compression null. Known are br, bz2, gz, snappy, zstd"),
        ({"compression": "sh"}, "names the compression 'sh'"),
        ({"format": "csv"}, "is of 'csv' shards. Only mds shards are read"),
    ],
)
def test_an_index_that_can_not_be_is_refused(
    tmp_path: Path, prepared: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_index(hostile(prepared, tmp_path, **changes), "loader")


def test_all_bad_files_of_a_folder_are_found_and_the_first_named(tmp_path: Path, prepared: Path) -> None:
    for path in (prepared / "train").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index = read_index(tmp_path, "here")
    check_shard_files(index, "here")
    for path in tmp_path.glob("*.mds"):
        path.write_bytes(path.read_bytes()[::-1])
    (tmp_path / "shard.00001.mds").unlink()
    with pytest.raises(DataError) as caught:
        check_shard_files(index, "here")
    lines = str(caught.value).splitlines()
    assert len(lines) == min(6, len(index.shards))
    assert lines[1] == f"here: {tmp_path}/shard.00001.mds is missing."
    assert lines[-1].endswith("Copy or prepare them again.")


def test_a_shard_that_is_cut_short_is_named(tmp_path: Path, prepared: Path) -> None:
    for path in (prepared / "val").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "shard.00000.mds").write_bytes(b"")
    with pytest.raises(DataError, match=r"shard\.00000\.mds: the shard can't be read"):
        list(read_samples(read_index(tmp_path, "loader"), [0]))
