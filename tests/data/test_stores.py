"""Shards that lie in an object store: S3, as moto serves it on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mptfoundry.config.streams import RecordsConfig
from mptfoundry.data.records.sources import find_records
from mptfoundry.errors import DataError
from mptfoundry.stores import Patience
from tests.loaders import text_loader

moto = pytest.importorskip(
    "moto.server", reason="needs moto, which serves S3 here: pip install 'moto[server]'"
)
boto3 = pytest.importorskip("boto3", reason="needs boto3, which comes with moto")
pytest.importorskip("flask", reason="needs moto's server: pip install 'moto[server]'")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, prepared: Path) -> Iterator[Any]:
    """A bucket, `data`, with the shards of `prepared/train` under `text/train`."""
    serving = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    serving.start()
    host, port = serving.get_host_and_port()
    given = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**given, "S3_ENDPOINT_URL": f"http://{host}:{port}"}.items():
        monkeypatch.setenv(name, value)
    found = boto3.resource("s3", endpoint_url=f"http://{host}:{port}").Bucket("data")
    found.create()
    found.objects.delete()
    for path in (prepared / "train").iterdir():
        found.upload_file(str(path), f"text/train/{path.name}")
    yield found
    serving.stop()


def read(tokenizer: Any, **options: Any) -> list[int]:
    settings = {"tokenizer": tokenizer, "max_seq_len": 64, "vocab_size": 320, "device_batch_size": 4}
    settings |= {"split": "train", "drop_last": False, "download_retry": 1}
    loader: Any = text_loader(**{**settings, **options}).dataloader
    return [int(number) for batch in loader for number in batch["sample_id"]]


def test_shards_are_read_from_a_store(
    bucket: Any, tiny_tokenizer: Any, prepared: Path, tmp_path: Path
) -> None:
    far = {"remote": "s3://data/text", "local": str(tmp_path / "cache")}
    assert read(tiny_tokenizer, **far) == read(tiny_tokenizer, local=str(prepared))
    for path in (prepared / "train").iterdir():
        assert (tmp_path / "cache" / "train" / path.name).read_bytes() == path.read_bytes()


def test_a_shard_that_a_store_lacks_or_has_damaged_is_named(
    bucket: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    shard = bucket.Object("text/train/shard.00001.mds")
    data = bytearray(shard.get()["Body"].read())
    data[-1] ^= 1
    shard.put(Body=bytes(data))
    far = {"remote": "s3://data/text", "local": str(tmp_path / "cache")}
    name = r"s3://data/text/train/shard\.00001\.mds"
    with pytest.raises(DataError, match=rf"{name} is damaged: its xxh64 .* also when fetched again"):
        read(tiny_tokenizer, **far)
    shard.delete()
    with pytest.raises(DataError, match=rf"{name} can't be fetched: .*not found"):
        read(tiny_tokenizer, **far)
    with pytest.raises(DataError, match=r"s3://data/gone/train/index\.json can't be fetched: .*not found"):
        read(tiny_tokenizer, remote="s3://data/gone", local=str(tmp_path / "other"))


def test_records_are_fetched_from_a_store_and_checked(bucket: Any, tmp_path: Path) -> None:
    source = RecordsConfig(remote="s3://data/text", local=str(tmp_path), split="train")
    (found,) = find_records(source, "train_loader.dataset", tmp_path / "cache").inputs
    shard = Path(found.path) / "shard.00001.mds"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    find_records(source, "train_loader.dataset", tmp_path / "cache")
    assert shard.read_bytes() == whole
    bucket.Object("text/train/shard.00001.mds").put(Body=whole[::-1])
    shard.unlink()
    with pytest.raises(DataError, match=r"shard\.00001\.mds is damaged: its xxh64"):
        find_records(source, "train_loader.dataset", tmp_path / "cache")


def test_a_store_that_gives_no_right_is_not_one_that_lacks_a_shard(
    bucket: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.exceptions import ClientError

    def refuse(*_: Any, **__: Any) -> None:
        raise ClientError({"Error": {"Code": "403", "Message": "Forbidden"}}, "HeadObject")

    monkeypatch.setattr("boto3.s3.inject.download_file", refuse)
    with pytest.raises(
        DataError, match=r"index\.json can't be fetched: access is refused, 403: look at the cred"
    ):
        read(tiny_tokenizer, remote="s3://data/text", local=str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", ["shards", "records"])
def test_a_download_waits_for_a_store_that_is_busy(
    bucket: Any,
    tiny_tokenizer: Any,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    from streaming.base.storage.download import S3Downloader

    short, left = Patience(seconds=30, first_pause=0.01, longest_pause=0.02), [3]
    download = S3Downloader._download_file_impl

    def hiccup(self: Any, remote: str, local: str, timeout: float) -> None:
        if left[0]:
            left[0] -= 1
            raise ConnectionResetError(104, "Connection reset by peer")
        download(self, remote, local, timeout)

    monkeypatch.setattr(S3Downloader, "_download_file_impl", hiccup)
    monkeypatch.setattr("mptfoundry.data.text.guarded.GuardedStream.patience", short)
    monkeypatch.setattr("mptfoundry.data.records.sources.FOR_DATA", short)
    if kind == "shards":
        far = {"remote": "s3://data/text", "local": str(tmp_path / "cache")}
        assert read(tiny_tokenizer, **far) == read(tiny_tokenizer, local=str(prepared))
    else:
        source = RecordsConfig(remote="s3://data/text", local=str(tmp_path), split="train")
        assert len(find_records(source, "train_loader.dataset", tmp_path / "cache").inputs) == 1
    assert capsys.readouterr().out.count("since 0 s (Connection reset by peer); tried again in 0 s") == 3
