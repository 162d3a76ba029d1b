"""From records to batches; what is bad or dropped is judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mptfoundry.data.examples.chat import CHATML
from mptfoundry.errors import DataError
from mptfoundry.tokenizer import load_tokenizer
from tests.loaders import finetuning_loader

GOOD = {"prompt": "a", "response": "b"}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
LONG = {"prompt": "long " * 40, "response": "b"}


def load(folder: Path, tokenizer_folder: Path, *streams: list[Any], **options: Any) -> tuple[Any, Any]:
    """The loader of streams of records, and its tokenizer."""
    tokenizer = load_tokenizer(str(tokenizer_folder))
    sources = {}
    shares = options.pop("proportions", [None] * len(streams))
    for number, (rows, share) in enumerate(zip(streams, shares, strict=True)):
        path = folder / f"{number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources[str(number)] = {"local": str(path), "proportion": share}
    given = {"cache_folder": str(folder / "cache"), "device_batch_size": 2, "seed": 1, "drop_last": False}
    return finetuning_loader(tokenizer=tokenizer, streams=sources, **{**given, **options}), tokenizer


def test_a_batch_holds_what_is_learned_and_nothing_of_the_padding(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    spec, tokenizer = load(tmp_path, tokenizer_folder, [GOOD, {"prompt": "ccc", "response": "dd"}])
    (batch,) = spec.dataloader
    trained = batch["labels"] != -100
    texts = [tokenizer.decode(row[marks]) for row, marks in zip(batch["labels"], trained, strict=True)]
    assert texts == ["b<|endoftext|>", "dd<|endoftext|>"]
    assert not (trained & ~batch["attention_mask"]).any()
    assert spec.get_num_tokens_in_batch(batch, token_type="loss_generating") == int(trained.sum())


def test_the_template_that_was_used_is_kept_with_the_tokenizer(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    assert load(tmp_path, tokenizer_folder, [GOOD, CHAT])[1].chat_template == CHATML
    assert load(tmp_path, tokenizer_folder, [GOOD, GOOD])[1].chat_template is None


def test_streams_are_mixed_by_proportion(tmp_path: Path, tokenizer_folder: Path) -> None:
    streams = [[GOOD] * 30, [CHAT] * 10]
    spec, _ = load(tmp_path, tokenizer_folder, *streams, proportions=[0.25, 0.75], shuffle=True)
    drawn = [number for batch in spec.dataloader for number in batch["sample_id"].tolist()]
    assert len(drawn) == 40
    assert sum(number >= 30 for number in drawn) == 30


def test_bad_records_end_a_run_unless_so_many_are_allowed(tmp_path: Path, tokenizer_folder: Path) -> None:
    rows = [GOOD, {"prompt": "a", "response": ""}, 7, GOOD] + [{"prompt": 1, "response": "b"}] * 5
    with pytest.raises(DataError) as caught:
        load(tmp_path, tokenizer_folder, rows, max_bad_records=6)
    lines = str(caught.value).splitlines()
    assert lines[0] == "train_loader.dataset.streams.0: 7 of 9 records are bad:"
    assert lines[1] == f"  {tmp_path}/0.jsonl:2: response: is empty."
    assert lines[5:] == [
        f"  {tmp_path}/0.jsonl:7: prompt: is a number, not a text.",
        "  ... and 2 more",
        "Fix them, or leave them out with dataset.max_bad_records: 7.",
    ]
    spec, _ = load(tmp_path, tokenizer_folder, rows, max_bad_records=7)
    assert len(spec.dataloader.dataset) == 2


def test_many_dropped_examples_end_a_run_unless_allowed(tmp_path: Path, tokenizer_folder: Path) -> None:
    rows = [GOOD] * 3 + [LONG]
    with pytest.raises(DataError) as caught:
        load(tmp_path, tokenizer_folder, rows)
    assert "25.0% of the records are dropped, 1 of 4:" in str(caught.value)
    assert "0.jsonl:4: prompt: the first token in the loss is token" in str(caught.value)
    assert str(caught.value).endswith("or allow it with dataset.max_dropped: 0.26.")
    spec, _ = load(tmp_path, tokenizer_folder, rows, max_dropped=0.25)
    assert len(spec.dataloader.dataset) == 3
    with pytest.raises(DataError, match="there are no examples"):
        load(tmp_path, tokenizer_folder, [LONG], max_dropped=1.0)


def test_columns_that_are_not_looked_at_are_said_once(
    tmp_path: Path, tokenizer_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = {"input_ids": [5], "labels": [6], "length": 2}
    both = {**GOOD, **CHAT}
    load(tmp_path, tokenizer_folder, [{**GOOD, "id": 1, "score": None}] * 4 + [GOOD, ids, both])
    assert [record.getMessage() for record in caplog.records] == [
        "train_loader.dataset.streams.0: these columns of its records are not looked at: "
        "id (in 4 records), length (in 1 record), prompt (in 1 record), response (in 1 record).",
        "train_loader.dataset.streams.0: 1 record held two forms, of which one is read: "
        f"{tmp_path}/0.jsonl:7: messages is read, not prompt and response.",
    ]
    caplog.clear()
    load(tmp_path, tokenizer_folder, [{**GOOD, "id": 1}] * 4)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.endswith("are not looked at: id.")
