from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mptfoundry.config.data import TextDatasetConfig, TextLoaderConfig
from mptfoundry.config.streams import StreamConfig
from mptfoundry.data.shards.index import read_index
from mptfoundry.data.views.mix import describe_mix, draw_mix, mix_table
from mptfoundry.errors import DataError


def mix(prepared: Path, first: dict[str, Any], second: dict[str, Any], **options: Any) -> list[Any]:
    streams = {
        "code": StreamConfig(local=str(prepared), split="train", **first),
        "rest": StreamConfig(local=str(prepared), split="val", **second),
    }
    return describe_mix(TextLoaderConfig(dataset=TextDatasetConfig(streams=streams)), 64, **options)


def test_shares_and_epochs_follow_the_proportions(prepared: Path) -> None:
    code, rest = mix(prepared, {"proportion": 3}, {"proportion": 1}, total_tokens=1_000_000)
    assert (code.share, rest.share) == (0.75, 0.25)
    assert (code.drawn_tokens, rest.drawn_tokens) == (750_000, 250_000)
    assert code.tokens == read_index(prepared / "train", "x").samples * 64
    assert code.epochs == 750_000 / code.tokens and rest.epochs == 250_000 / rest.tokens


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {}),
        ({"proportion": 0.6}, {"proportion": 0.4}),
        ({"repeat": 2}, {}),
        ({"choose": 10}, {"choose": 30}),
    ],
)
def test_an_epoch_is_what_streaming_draws(
    prepared: Path, first: dict[str, Any], second: dict[str, Any]
) -> None:
    from streaming import Stream, StreamingDataset

    streams = [
        Stream(local=str(prepared), split=split, **weight)
        for split, weight in (("train", first), ("val", second))
    ]
    dataset = StreamingDataset(streams=streams, batch_size=1)
    for row, stream in zip(mix(prepared, first, second), dataset.streams, strict=True):
        assert row.drawn_tokens / 64 == pytest.approx(stream.choose, abs=1)
        assert row.share == pytest.approx(stream.proportion, abs=0.01)


def test_document_lengths_are_those_of_the_documents(
    prepared: Path, corpus_texts: list[str], tiny_tokenizer: Any
) -> None:
    rows = mix(prepared, {}, {})
    lengths = sorted(np.concatenate([row.document_lengths for row in rows]).tolist())
    expected = [len(tiny_tokenizer(text, truncation=False)["input_ids"]) + 1 for text in corpus_texts]
    assert set(lengths) <= set(expected)
    assert len(lengths) >= len(expected) - 2
    for row, split in zip(rows, ("train", "val"), strict=True):
        meta = read_index(prepared / split, "x").meta
        assert meta is not None and row.mean_document_tokens is not None
        assert row.mean_document_tokens * meta.documents == meta.tokens + meta.dropped_tokens


def test_the_table_has_a_line_for_each_stream(prepared: Path) -> None:
    table = mix_table(mix(prepared, {"proportion": 3}, {"proportion": 1}, total_tokens=1e9)).splitlines()
    assert table[0].split() == [
        "stream",
        "share",
        "tokens",
        "read",
        "tokens",
        "it",
        "has",
        "epochs",
        "tokens/document",
    ]
    assert table[1].split()[:3] == ["code", "75.0%", "750,000,000"]
    assert len({len(line) for line in table}) == 1


def test_the_mix_is_drawn_into_one_picture(prepared: Path, tmp_path: Path) -> None:
    path = draw_mix(mix(prepared, {}, {}), tmp_path / "pictures" / "mix.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_streams_without_borders_of_documents_are_drawn_too(tmp_path: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(columns={"text": "str"}, out=str(tmp_path / "x")) as writer:
        writer.write({"text": "raw"})
    streams = {"raw": StreamConfig(local=str(tmp_path / "x"))}
    rows = describe_mix(TextLoaderConfig(dataset=TextDatasetConfig(streams=streams, eos_token_id=0)), 64)
    assert rows[0].document_lengths.size == 0 and "unknown" in mix_table(rows)
    draw_mix(rows, tmp_path / "mix.png")


def test_a_stream_that_is_not_here_is_named(tmp_path: Path) -> None:
    streams = {"far": StreamConfig(remote="s3://bucket/x", local=str(tmp_path / "no"))}
    with pytest.raises(DataError, match=r"streams.far: the folder .* is missing"):
        describe_mix(TextLoaderConfig(dataset=TextDatasetConfig(streams=streams)), 64)
