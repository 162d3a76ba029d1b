from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mptfoundry.config.data import TextDatasetConfig, TextLoaderConfig
from mptfoundry.config.streams import StreamConfig
from mptfoundry.data.text.streams import check_shards, plan_streams, read_stream
from mptfoundry.errors import DataError


def plan(streams: dict[str, dict[str, Any]] | None = None, **options: Any) -> list[Any]:
    if streams is not None:
        options["streams"] = {name: StreamConfig(**stream) for name, stream in streams.items()}
    dataset = TextDatasetConfig(split="train", **options)
    return plan_streams(TextLoaderConfig(dataset=dataset), "loader")


def test_a_local_stream_is_read_in_place(prepared: Path) -> None:
    for options in ({"local": str(prepared)}, {"remote": str(prepared)}):
        (source,) = plan({"code": options})
        assert source.arguments == {"remote": None, "local": str(prepared), "split": "train"}
        assert source.where == "loader.dataset.streams.code"
        assert source.folder == prepared / "train"


def test_a_stream_is_copied_where_both_folders_are_given(prepared: Path, tmp_path: Path) -> None:
    (source,) = plan(remote=str(prepared), local=str(tmp_path))
    assert source.arguments["remote"] == str(prepared) and source.arguments["local"] == str(tmp_path)
    assert read_stream(source).folder == prepared / "train"


def test_a_stream_from_afar_is_kept_in_a_folder_of_its_own() -> None:
    first, second = plan({"a": {"remote": "s3://bucket/a"}, "b": {"remote": "s3://bucket/b"}})
    assert first.arguments["local"] != second.arguments["local"]
    assert plan({"a": {"remote": "s3://bucket/a"}})[0].arguments == first.arguments


def test_a_streams_own_split_goes_before_the_loaders(prepared: Path) -> None:
    first, second = plan({"a": {"local": str(prepared), "split": "val"}, "b": {"local": str(prepared)}})
    assert (first.folder.name, second.folder.name) == ("val", "train")


def test_a_missing_stream_is_named(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"loader.dataset.streams.b: the folder .*gone is missing"):
        plan({"a": {"local": str(prepared)}, "b": {"local": str(tmp_path / "gone")}})


def test_other_lengths_and_tokenizers_are_refused(
    prepared: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    from mptfoundry.tokenizer import train_bpe

    (source,) = plan(local=str(prepared))
    assert check_shards(source, tiny_tokenizer, 64).meta is not None
    with pytest.raises(DataError, match=r"have 64 tokens, but max_seq_len is 128\. Set max_seq_len: 64, or"):
        check_shards(source, tiny_tokenizer, 128)
    other = train_bpe(["other words " * 9], 270, tmp_path / "tokenizer")
    with pytest.raises(
        DataError, match=r"was prepared with another tokenizer \(.*, 320 ids\) than this run's"
    ):
        check_shards(source, other, 64)
