from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streaming import MDSWriter

from mptfoundry.data.views.shards_preview import preview
from mptfoundry.errors import DataError
from tests.loaders import text_loader

SEQ, VOCAB = 64, 320


@pytest.fixture
def build(tiny_tokenizer: Any) -> Callable[..., Any]:
    def call(**options: Any) -> Any:
        settings = {
            "tokenizer": tiny_tokenizer,
            "max_seq_len": SEQ,
            "vocab_size": VOCAB,
            "device_batch_size": 4,
        }
        return text_loader(**{**settings, **options})

    return call


def write_shards(folder: Path, column: str, rows: Any) -> str:
    name = "text" if column.startswith("str") else "tokens"
    column = column.removeprefix("str_")
    with MDSWriter(columns={name: column}, out=str(folder / "train")) as writer:
        for row in rows:
            writer.write({name: row})
    return str(folder)


def rows_of(spec: Any) -> dict[int, list[int]]:
    return {
        int(number): ids.tolist()
        for batch in spec.dataloader
        for number, ids in zip(batch["sample_id"], batch["input_ids"], strict=True)
    }


def numbered(count: int, start: int = 0, length: int = SEQ) -> np.ndarray:
    """Samples whose every token is their number."""
    return np.repeat(np.arange(start, start + count)[:, None], length, axis=1)


def test_batches_hold_the_samples_that_were_prepared(
    build: Any, prepared: Path, read_tokens: Callable[[Path], np.ndarray]
) -> None:
    spec = build(local=str(prepared), split="train", drop_last=False)
    samples = read_tokens(prepared / "train")
    assert rows_of(spec) == dict(enumerate(samples.tolist()))
    batch = next(iter(spec.dataloader))
    assert batch["input_ids"].shape == batch["labels"].shape == (4, SEQ)
    assert spec.get_num_samples_in_batch(batch) == 4
    assert spec.get_num_tokens_in_batch(batch) == 4 * SEQ
    assert spec.get_num_tokens_in_batch(batch, "loss_generating") == 4 * (SEQ - 1)
    assert len(spec.split_batch(batch, 2)) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_the_same_each_time_and_for_any_number_of_workers(
    build: Any, prepared: Path, workers: int
) -> None:
    options = {"local": str(prepared), "split": "train", "shuffle": True, "drop_last": False}
    options["device_batch_size"] = 32
    first = [batch["sample_id"].tolist() for batch in build(**options, seed=3).dataloader]
    again = [
        batch["sample_id"].tolist() for batch in build(**options, seed=3, num_workers=workers).dataloader
    ]
    other = [batch["sample_id"].tolist() for batch in build(**options, seed=4).dataloader]
    assert sorted(chain(*first)) == sorted(chain(*again)) == list(range(sum(map(len, first))))
    assert first == again or workers
    assert [sorted(batch) for batch in first] != [sorted(batch) for batch in other]


def test_building_and_reading_leave_the_random_state_alone(build: Any, prepared: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(iter(build(local=str(prepared), split="train", shuffle=True).dataloader))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loader_goes_on_where_it_was(build: Any, prepared: Path) -> None:
    options = {"local": str(prepared), "split": "train", "shuffle": True}
    loader = build(**options).dataloader
    batches = iter(loader)
    for _ in range(5):
        next(batches)
    state = loader.state_dict()
    rest = [batch["sample_id"].tolist() for batch in batches]
    resumed = build(**options).dataloader
    resumed.load_state_dict(state)
    assert [batch["sample_id"].tolist() for batch in resumed] == rest


def drawn(spec: Any, streams: int) -> list[int]:
    """How often samples of each stream come in an epoch; their tokens are 100 * stream + number."""
    counts: Counter[int] = Counter()
    for batch in spec.dataloader:
        counts.update((batch["input_ids"][:, 0] // 100).tolist())
    return [counts[stream] for stream in range(streams)]


@pytest.mark.parametrize(
    ("weights", "options", "expected"),
    [
        (({}, {}), {}, [60, 20]),
        (({"proportion": 0.25}, {"proportion": 0.75}), {}, [20, 60]),
        (({"proportion": 1}, {"proportion": 3}), {"epoch_size": 40}, [10, 30]),
        (({"repeat": 0.5}, {"repeat": 3}), {}, [30, 60]),
        (({"choose": 8}, {"choose": 12}), {}, [8, 12]),
        (({"choose": 20}, {}), {}, [20, 20]),
    ],
)
def test_streams_are_mixed_by_proportion_repeat_or_choose(
    build: Any, tmp_path: Path, weights: Any, options: dict[str, Any], expected: list[int]
) -> None:
    streams = {}
    for number, (count, weight) in enumerate(zip((60, 20), weights, strict=True)):
        rows = numbered(count, 100 * number).astype(np.uint16)
        local = write_shards(tmp_path / str(number), f"ndarray:uint16:{SEQ}", rows)
        streams[str(number)] = {"local": local, "split": "train", **weight}
    spec = build(streams=streams, shuffle=True, drop_last=False, device_batch_size=5, **options)
    assert drawn(spec, 2) == expected


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
@pytest.mark.parametrize("column", ["ndarray", "ndarray:DTYPE", "bytes"])
def test_shards_of_llm_foundry_are_read_as_they_are(
    build: Any, tmp_path: Path, dtype: str, column: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = numbered(6).astype(dtype)
    stored = [row.tobytes() if column == "bytes" else row for row in rows]
    local = write_shards(tmp_path, column.replace("DTYPE", dtype), stored)
    encoding = {"token_encoding_type": dtype} if column == "bytes" else {}
    with caplog.at_level(logging.WARNING):
        spec = build(local=local, split="train", device_batch_size=2, **encoding)
    assert caplog.text.count("made by another tool, so the tokenizer can't be compared") == 1
    assert rows_of(spec) == dict(enumerate(rows.astype(int).tolist()))


def test_raw_text_is_tokenised_padded_and_cut(build: Any, tmp_path: Path, tiny_tokenizer: Any) -> None:
    texts = ["def f(): pass", "word " * 200, "", "café 言葉"]
    local = write_shards(tmp_path, "str", texts)
    (batch,) = build(local=local, split="train").dataloader
    for row, text in enumerate(texts):
        ids = tiny_tokenizer(text, truncation=False)["input_ids"][:SEQ] or [tiny_tokenizer.pad_token_id]
        assert batch["input_ids"][row].tolist() == ids + [tiny_tokenizer.pad_token_id] * (SEQ - len(ids))
        assert batch["labels"][row].tolist() == ids + [-100] * (SEQ - len(ids))
        assert batch["attention_mask"][row].sum() == len(ids)


def test_short_samples_are_padded_by_place_even_if_padding_is_eos(
    build: Any, tmp_path: Path, tokenizer_folder: Path
) -> None:
    from mptfoundry.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(tokenizer_folder), {"pad_token": "<|endoftext|>"})
    rows = [np.array([5, 0, 6, 0], np.int32), np.array([7, 8, 0], np.int32)]
    local = write_shards(tmp_path, "ndarray:int32", rows)
    (batch,) = build(local=local, split="train", tokenizer=tokenizer, device_batch_size=2).dataloader
    assert batch["labels"][0, :5].tolist() == [5, 0, 6, 0, -100]
    assert batch["labels"][1, :5].tolist() == [7, 8, 0, -100, -100]


def test_sequence_ids_come_from_the_tokenizers_eos(build: Any, prepared: Path) -> None:
    batch = next(iter(build(local=str(prepared), split="train", sequence_ids=True).dataloader))
    is_end = batch["input_ids"] == 0
    assert (batch["sequence_id"] == is_end.cumsum(1) - is_end.long()).all()
    assert "sequence_id" not in next(iter(build(local=str(prepared), split="train").dataloader))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_id_that_the_model_has_not_is_named_as_it_is_read(
    build: Any, tmp_path: Path, workers: int
) -> None:
    rows = numbered(80).astype(np.int32)
    rows[40, 9] = 320
    local = write_shards(tmp_path, f"ndarray:int32:{SEQ}", rows)
    spec = build(streams={"code": {"local": local}}, split="train", num_workers=workers)
    message = (
        r"^train_loader.dataset.streams.code: sample \d+ of shard.\d+.mds has the id 320, "
        r"but the model's are 0 to 319\. Use the tokenizer"
    )
    with pytest.raises(DataError, match=message) as caught:
        rows_of(spec)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("column", "row", "options", "message"),
    [
        (
            "ndarray:int32",
            np.full(65, 5, np.int32),
            {},
            r"has 65 tokens; max_seq_len is 64\. Set max_seq_len: 65",
        ),
        ("ndarray:int32", np.full(64, -1, np.int32), {}, "has the id -1, but the model's are 0 to 319"),
        ("ndarray:int32", np.full(64, 320, np.int32), {}, "has the id 320, but the model's are 0 to 319"),
        ("ndarray:float32", np.full(64, 1, np.float32), {}, "tokens of type float32"),
        ("bytes", b"\0" * 12, {}, "has 12 bytes, which are not a whole number of int64 ids"),
        ("bytes", np.full(9, 3, np.int32).tobytes() * 2, {}, "has the id 12884901891"),
        *(
            (
                "bytes",
                np.arange(32, dtype=written).tobytes(),
                {"token_encoding_type": read},
                f"holds {written} ids, read as {read}: .* Set token_encoding_type: {written}",
            )
            for written, read in (
                ("int64", "int32"),
                ("int64", "uint16"),
                ("int64", "uint8"),
                ("int32", "int16"),
                ("int16", "uint8"),
            )
        ),
        ("int32", 5, {}, "has tokens of type int"),
        ("str_bytes", b"caf\xe9 au lait", {}, r"its text is not UTF-8 \(.* at byte 3\)"),
    ],
)
def test_shards_of_others_are_looked_into_before_training(
    build: Any, tmp_path: Path, column: str, row: Any, options: dict[str, Any], message: str
) -> None:
    local = write_shards(tmp_path, column, [row] * 8)
    with pytest.raises(DataError, match=message):
        build(local=local, split="train", **options)


def test_zeros_between_ids_are_no_other_type_where_they_may_be_ids(build: Any, tmp_path: Path) -> None:
    rows = [np.array([5, 0], np.int32), np.zeros(64, np.int32), np.array([5, 0, 7, 3] * 16, np.int32)]
    local = write_shards(tmp_path, "bytes", [row.tobytes() for row in rows * 4])
    found = rows_of(build(local=local, split="train", token_encoding_type="int32"))
    assert found[0][:2] == [5, 0] and found[1] == [0] * 64 and found[2] == [5, 0, 7, 3] * 16


def test_a_column_that_is_neither_tokens_nor_text_is_refused(build: Any, tmp_path: Path) -> None:
    with MDSWriter(columns={"image": "bytes"}, out=str(tmp_path / "train")) as writer:
        for _ in range(8):
            writer.write({"image": b"x"})
    with pytest.raises(
        DataError, match=r"has the columns image. Give shards with a column `tokens` or `text`"
    ):
        build(local=str(tmp_path), split="train")


def test_too_few_samples_for_a_batch_are_refused(build: Any, prepared: Path) -> None:
    with pytest.raises(
        DataError, match=r"samples for each device don't fill one batch of 9000\. Use a smaller"
    ):
        build(local=str(prepared), split="train", device_batch_size=9000)
    assert len(rows_of(build(local=str(prepared), split="val", device_batch_size=9000, drop_last=False))) > 1


def test_a_remote_folder_is_copied_and_its_tokenizer_compared(
    build: Any, prepared: Path, tmp_path: Path
) -> None:
    spec = build(remote=str(prepared), local=str(tmp_path / "copy"), split="train", drop_last=False)
    assert rows_of(spec) == rows_of(build(local=str(prepared), split="train", drop_last=False))
    assert (tmp_path / "copy" / "train" / "shard.00000.mds").is_file()


@pytest.mark.parametrize("adds", ["nothing", "bos", "eos", "both"])
def test_raw_text_has_what_the_tokenizer_adds_and_spelled_tokens_as_asked(
    build: Any, tmp_path: Path, adding_tokenizers: dict[str, str], adds: str
) -> None:
    from mptfoundry.tokenizer import load_tokenizer

    tokenizer: Any = load_tokenizer(adding_tokenizers[adds])
    folder = write_shards(tmp_path, "str", ["one </s> two", "three"])
    options = {"local": folder, "split": "train", "tokenizer": tokenizer, "vocab_size": 400}
    before, after = [1] * (adds in ("bos", "both")), [2] * (adds in ("eos", "both"))
    for kind, eos in (("as_tokens", 1), ("as_text", 0)):
        batch = next(iter(build(device_batch_size=2, special_tokens=kind, **options).dataloader))
        kept = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        row = batch["input_ids"][0][kept[0]].tolist()
        assert row[: len(before)] == before and row[len(row) - len(after) :] == after
        assert row.count(2) == eos + len(after)
        text = preview(Path(folder, "train"), tokenizer=adding_tokenizers[adds], as_text=kind == "as_text")
        assert f"{len(row)} tokens" in text
