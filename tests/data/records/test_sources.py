"""Records are found where a config says that they lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mptfoundry.config.streams import RecordsConfig
from mptfoundry.data.records.inputs import Inventory
from mptfoundry.data.records.records import Row, plan_units, read_rows
from mptfoundry.data.records.sources import content_digest, find_records
from mptfoundry.errors import DataError

RECORDS = [{"prompt": f"p{n}", "response": f"r{n}"} for n in range(3)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same records as lines, an array, Parquet, a saved data set and MDS shards, and others."""
    import datasets
    from pyarrow import Table, parquet
    from streaming import MDSWriter

    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    for name in (
        "lines/train.jsonl",
        "plain/all.jsonl",
        "parts/train-00000-of-00001.jsonl",
        "sub/train/a.jsonl",
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(lines)
    (tmp_path / "lines" / "test.jsonl").write_text('{"prompt": "held", "response": "out"}\n')
    (tmp_path / "lines" / "README.md").write_text("No record.\n")
    (tmp_path / "array.json").write_text(json.dumps(RECORDS, indent=1))
    parquet.write_table(Table.from_pylist(RECORDS), tmp_path / "train.parquet")
    datasets.Dataset.from_list(RECORDS).save_to_disk(str(tmp_path / "saved"))
    with MDSWriter(out=str(tmp_path / "mds" / "train"), columns={"prompt": "str", "response": "str"}) as out:
        for record in RECORDS:
            out.write(record)
    return tmp_path


def records_of(found: Inventory) -> list[Any]:
    units = plan_units(found.inputs, found.datasets, False)
    rows = [row for unit in units for part in unit.parts for row in read_rows(part, found.datasets)]
    assert all(isinstance(row, Row) for row in rows)
    return [row.values for row in rows if isinstance(row, Row)]


@pytest.mark.parametrize(
    "given",
    [
        {"hf_name": "lines", "split": "train"},
        {"hf_name": "lines/train.jsonl", "split": "anything"},
        {"local": "plain", "split": "train"},
        {"local": "parts", "split": "train"},
        {"local": "sub", "split": "train"},
        {"hf_name": "array.json"},
        {"hf_name": "train.parquet"},
        {"hf_name": "saved", "split": "train"},
        {"local": "mds", "split": "train"},
        {"remote": "mds", "split": "train"},
        {"hf_name": "json", "hf_kwargs": {"data_dir": "lines"}, "split": "train"},
        {"hf_name": "json", "hf_kwargs": {"data_files": "lines/tra*.jsonl"}},
        {"hf_name": "parquet", "hf_kwargs": {"data_files": {"train": ["train.parquet"]}}, "split": "train"},
        {"hf_name": "lines", "hf_kwargs": {"data_files": {"train": "train.jsonl"}}, "split": "train"},
    ],
    ids=str,
)
def test_records_are_the_same_wherever_they_lie(
    given: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert (
        records_of(find_records(RecordsConfig(**given), "train_loader.dataset", folder / "cache")) == RECORDS
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"local": "gone"}, "local: gone: there is no such file or folder."),
        ({"hf_name": "./gone"}, "hf_name: gone: there is no such file or folder."),
        (
            {"hf_name": "lines", "split": "val"},
            "split: lines has no val: no such folder, and no file with that",
        ),
        (
            {"hf_name": "plain", "hf_kwargs": {"revision": "x"}},
            "hf_kwargs.revision: has no effect on local files",
        ),
        (
            {"hf_name": "json", "hf_kwargs": {"data_files": "gone.jsonl"}},
            "data_files: gone.jsonl: there is no",
        ),
        (
            {"hf_name": "json", "hf_kwargs": {"data_files": {"a": "x"}}, "split": "b"},
            "data_files: there is no b. Use split: a.",
        ),
        *(
            (
                {key: place, "split": "train[:50%]"},
                "split: train[:50%]: only data sets on the hub can be read in slices",
            )
            for key, place in (("hf_name", "lines"), ("local", "train.parquet"), ("hf_name", "saved"))
        ),
        (
            {"hf_name": "json", "hf_kwargs": {"data_files": "lines/train.jsonl"}, "split": "train[:50%]"},
            "split: train[:50%]: only data sets on the hub can be read in slices",
        ),
        (
            {"remote": "s3://bucket/mds", "split": "train[:9]"},
            "split: train[:9]: only data sets on the hub can be read in slices",
        ),
        ({"hf_name": "s3://bucket/folder"}, "hf_name: s3://bucket/folder: a URL of shards is a remote."),
    ],
    ids=str,
)
def test_what_is_missing_is_said_with_its_key(
    given: dict[str, Any], said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(DataError) as caught:
        find_records(RecordsConfig(**given), "train_loader.dataset", folder / "cache")
    assert str(caught.value).startswith("train_loader.dataset.")
    assert said in str(caught.value)


def test_the_digest_is_of_the_content_alone(folder: Path) -> None:
    def digest(path: Path) -> str:
        return content_digest(find_records(RecordsConfig(local=str(path)), "x", folder), folder)

    copy = folder / "copy.jsonl"
    copy.write_bytes((folder / "plain" / "all.jsonl").read_bytes())
    assert digest(copy) == digest(folder / "lines" / "train.jsonl")
    copy.write_text(copy.read_text().replace("r2", "R2"))
    assert digest(copy) != digest(folder / "lines" / "train.jsonl")
    shard = next((folder / "mds" / "train").glob("*.mds"))
    before = digest(folder / "mds" / "train")
    shard.write_bytes(shard.read_bytes().replace(b"r2", b"R2"))
    assert digest(folder / "mds" / "train") != before


def test_a_damaged_shard_of_records_is_named(folder: Path, tmp_path: Path) -> None:
    from streaming import MDSWriter

    hashed: dict[str, Any] = {"columns": {"prompt": "str", "response": "str"}, "hashes": ["xxh3_64"]}
    with MDSWriter(out=str(tmp_path / "hashed"), **hashed) as out:
        out.write({"prompt": "one", "response": "two"})
    source = RecordsConfig(local=str(tmp_path / "hashed"))
    assert find_records(source, "train_loader.dataset", tmp_path / "cache").inputs
    path = tmp_path / "hashed" / "shard.00000.mds"
    path.write_bytes(path.read_bytes().replace(b"two", b"too"))
    with pytest.raises(DataError, match=r"^train_loader\.dataset: \S+mds is damaged: its xxh3_64 is not"):
        find_records(source, "train_loader.dataset", tmp_path / "cache")
    path.unlink()
    with pytest.raises(DataError, match=r"^train_loader\.dataset: \S+mds is missing\."):
        find_records(source, "train_loader.dataset", tmp_path / "cache")


def test_remote_shards_are_copied_here_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from streaming.base.storage import download

    fetched: list[str] = []

    class FromFolder(download.LocalDownloader):
        @staticmethod
        def _client_identifier() -> str:
            return "file"

        def _download_file_impl(self, remote: str, local: str, timeout: float) -> None:
            fetched.append(Path(remote).name)
            super()._download_file_impl(remote.removeprefix("file://"), local, timeout)

    monkeypatch.setitem(download.DOWNLOADER_MAPPINGS, "file", FromFolder)
    source = RecordsConfig(remote=f"file://{folder}/mds", split="train")
    for _ in range(2):
        assert records_of(find_records(source, "train_loader.dataset", folder / "cache")) == RECORDS
    assert fetched == ["index.json", "shard.00000.mds", "index.json"]
    gone = RecordsConfig(remote=f"file://{folder}/gone")
    with pytest.raises(DataError, match=r"train_loader\.dataset\.remote: file://.*/gone can't be fetched: "):
        find_records(gone, "train_loader.dataset", folder / "cache")
