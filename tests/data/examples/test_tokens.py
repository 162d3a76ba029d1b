"""Records that hold ids: turns of llm-foundry's, sequences with a loss mask, and what is neither."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mptfoundry.config.data import FinetuningDatasetConfig
from mptfoundry.data.examples.cache import prepare_examples
from mptfoundry.data.examples.store import ExampleStore
from tests.loaders import context_of

PROMPT, RESPONSE = [5, 6, 7, 8, 9, 10, 11, 12, 13], [20, 21, 22, 23, 24, 0]


def examples(place: Path, tokenizer: Any, **options: Any) -> ExampleStore:
    context = context_of(tokenizer, max_seq_len=options.pop("max_seq_len", 64))
    cache = str(place.parent / "cache")
    dataset = FinetuningDatasetConfig(local=str(place), cache_folder=cache, **options)
    (source,) = dataset.sources.values()
    return ExampleStore(prepare_examples("x", source, dataset, context, workers=1, progress=False))


def of_records(records: list[Any], folder: Path, tokenizer: Any, **options: Any) -> ExampleStore:
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return examples(folder / "records.jsonl", tokenizer, **options)


def of_shards(
    columns: dict[str, str], samples: list[Any], folder: Path, tokenizer: Any, **options: Any
) -> ExampleStore:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder / "mds"), columns=columns) as out:
        for sample in samples:
            out.write(sample)
    return examples(folder / "mds", tokenizer, **options)


def rows(store: ExampleStore) -> list[tuple[list[int], list[int]]]:
    """Each example: its ids, and the places that are trained."""
    return [
        (ids.tolist(), np.flatnonzero(trained).tolist())
        for ids, trained in map(store.__getitem__, range(len(store)))
    ]


@pytest.mark.parametrize(("dtype", "options"), [("int64", {}), ("int32", {"token_encoding_type": "int32"})])
def test_ids_in_columns_of_bytes_are_those_that_were_written(
    dtype: str, options: dict[str, Any], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    sample = {
        name: np.array(ids, dtype).tobytes() for name, ids in (("input_ids", PROMPT), ("labels", RESPONSE))
    }
    store = of_shards(
        {"input_ids": "bytes", "labels": "bytes"}, [sample], tmp_path, tiny_tokenizer, **options
    )
    assert rows(store) == [([*PROMPT, *RESPONSE], [*range(9, 15)])]


@pytest.mark.parametrize(
    ("written", "read", "said"),
    [
        (
            "int32",
            "int64",
            "input_ids: has 36 bytes, which are not a whole number of int64 ids. Set token_encoding_type",
        ),
        (
            "int64",
            "int32",
            "input_ids: holds int64 ids, read as int32: there are zeros between them. Set",
        ),
        (
            "int64",
            "uint16",
            "input_ids: holds int64 ids, read as uint16: there are zeros between them. Set",
        ),
        ("int32", "uint8", "input_ids: holds int32 ids, read as uint8"),
        ("uint8", "int64", "input_ids: has 9 bytes"),
        ("float64", "int64", "is not an id of the tokenizer, which has 0 to 319"),
    ],
)
def test_bytes_of_another_type_are_bad_records(
    written: str, read: str, said: str, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    sample = {
        name: np.array(ids, written).tobytes() for name, ids in (("input_ids", PROMPT), ("labels", RESPONSE))
    }
    columns = {"input_ids": "bytes", "labels": "bytes"}
    store = of_shards(columns, [sample] * 2, tmp_path, tiny_tokenizer, token_encoding_type=read)
    counts = store.meta["counts"]
    assert (len(store), counts["bad"]) == (0, 2)
    assert counts["problems"][1].startswith(f"{tmp_path}/mds: sample 1: ")
    assert said in counts["problems"][1]


def test_ends_of_text_between_few_ids_are_no_other_type(tmp_path: Path, tiny_tokenizer: Any) -> None:
    sample = {"input_ids": np.array([5, 0, 6, 0], np.int32), "labels": np.array([7, 0], np.int32)}
    store = of_shards(
        {"input_ids": "bytes", "labels": "bytes"},
        [{name: ids.tobytes() for name, ids in sample.items()}],
        tmp_path,
        tiny_tokenizer,
        token_encoding_type="int32",
    )
    assert rows(store) == [([5, 0, 6, 0, 7, 0], [4, 5])]


def test_arrays_and_texts_as_bytes_are_read(tmp_path: Path, tiny_tokenizer: Any) -> None:
    arrays = {"input_ids": np.array(PROMPT, np.uint16), "labels": np.array(RESPONSE, np.uint16)}
    columns = {"input_ids": "ndarray:uint16", "labels": "ndarray:uint16"}
    assert rows(of_shards(columns, [arrays], tmp_path / "a", tiny_tokenizer)) == [
        ([*PROMPT, *RESPONSE], [*range(9, 15)])
    ]
    texts = [("é? ", "Yes é"), ("\udcff", "x")]
    samples = [
        {"prompt": prompt.encode("utf-8", "surrogateescape"), "response": response.encode()}
        for prompt, response in texts
    ]
    store = of_shards({"prompt": "bytes", "response": "bytes"}, samples, tmp_path / "b", tiny_tokenizer)
    assert [tiny_tokenizer.decode(ids) for ids, _ in map(store.__getitem__, range(len(store)))] == [
        "é? Yes é<|endoftext|>"
    ]
    assert store.meta["counts"]["problems"] == [f"{tmp_path}/b/mds: sample 1: prompt: byte 0 is not UTF-8."]


@pytest.mark.parametrize(
    ("record", "ids", "trained"),
    [
        ({"labels": [-100, -100, 7, 0]}, [5, 6, 7, 0], [2, 3]),
        ({"labels": [5, 6, 7, 0]}, [5, 6, 7, 0], [0, 1, 2, 3]),
        ({"labels": [-100, -100, 7, 8], "input_ids": [5, 6, 7, 8]}, [5, 6, 7, 8], [2, 3]),
        ({"labels": [-100, 6, 7, -100], "attention_mask": [1, 1, 1, 0]}, [5, 6, 7], [1, 2]),
        ({"labels": [-100, -100, 7, 0], "attention_mask": [0, 1, 1, 1]}, [6, 7, 0], [1, 2]),
        ({"labels": [7], "input_ids": [5, 6]}, [5, 6, 7, 0], [2, 3]),
        ({"labels": [7, 8, 9, 10]}, [5, 6, 7, 0, 7, 8, 9, 10, 0], [4, 5, 6, 7, 8]),
        (
            {"turns": [{"input_ids": [5, 6], "labels": [5, 6], "attention_mask": [1, 1]}]},
            [5, 6, 5, 6, 0],
            [2, 3, 4],
        ),
        ({"turns": None, "attention_mask": None, "labels": [7]}, [5, 6, 7, 0, 7, 0], [4, 5]),
    ],
    ids=str,
)
def test_labels_are_a_loss_mask_or_a_response(
    record: dict[str, Any], ids: list[int], trained: list[int], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    store = of_records([{"input_ids": [5, 6, 7, 0], **record}], tmp_path, tiny_tokenizer)
    assert (store.meta["counts"]["problems"], rows(store)) == ([], [(ids, trained)])


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"labels": [-100, 7]}, "labels: there are 2 for 4 input_ids. With an attention_mask or a -100"),
        ({"labels": [7], "attention_mask": [1, 1, 1, 1]}, "labels: there are 1 for 4 input_ids."),
        (
            {"labels": [-100, 7, 0, -100]},
            "labels[1]: 7 is neither -100 nor the id at its place, 6",
        ),
        ({"labels": [5, 6, 9, 0]}, "labels[2]: 9 is neither -100 nor the id at its place, 7"),
        ({"labels": [6, 7, 0, 0]}, "labels: are input_ids moved by one"),
        (
            {"labels": [5, 6, 7, 0], "attention_mask": [1, 1, 1, 0]},
            "labels[3]: is in the loss, though attention_mask",
        ),
        ({"labels": [5, 6, 7, 0], "attention_mask": [1, 0, 1, 1]}, "attention_mask[1]: is 0 between tokens"),
        ({"labels": [5, 6, 7, 0], "attention_mask": [1, 1, 2, 2]}, "attention_mask[2]: 2 is neither 0 nor 1"),
        ({"labels": [5, 6, 7, 0], "attention_mask": [1, 1]}, "attention_mask: has 2 entries for 4 input_ids"),
        ({"labels": [-100] * 4, "attention_mask": [0] * 4}, "input_ids: is empty"),
        ({"labels": [700]}, "labels[0]: 700 is not an id of the tokenizer, which has 0 to 319"),
        ({"labels": [7], "input_ids": [5, -1]}, "input_ids[1]: -1 is not an id of the tokenizer"),
        ({"labels": [7], "input_ids": [5, 10**30]}, "input_ids[1]: 1000"),
        ({"labels": [7], "input_ids": [5, 6.5]}, "input_ids[1]: 6.5 is not an integer"),
        ({"labels": [7], "input_ids": [5, True]}, "input_ids[1]: True is not an integer"),
        ({"labels": [7], "input_ids": "5 6"}, "input_ids: is a string, not a list of ids"),
        ({"turns": [{"input_ids": [5], "labels": [-100]}]}, "turns[0].labels[0]: -100 is not an id"),
        ({"turns": [{"input_ids": [5]}]}, "turns[0].labels: is missing or null"),
        ({"turns": [{"input_ids": [5], "labels": [6]}, 7]}, "turns[1]: is a number, not an object"),
        ({"labels": None}, "the fields are input_ids. Expected prompt and response"),
    ],
    ids=str,
)
def test_ids_that_are_neither_are_a_bad_record_with_line_and_field(
    record: dict[str, Any], said: str, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    good = {"input_ids": [5], "labels": [6]}
    store = of_records([good, {"input_ids": [5, 6, 7, 0], **record}], tmp_path, tiny_tokenizer)
    counts = store.meta["counts"]
    assert (len(store), counts["bad"]) == (1, 1)
    assert counts["problems"][0].startswith(f"{tmp_path}/records.jsonl:2: {said}")


def test_a_loss_mask_that_learns_nothing_is_dropped_and_a_long_one_is_cut(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    records = [
        {"input_ids": [5, 6], "labels": [-100, -100]},
        {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]},
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, -100, 8]},
        {"input_ids": [], "labels": [5, 6]},
        {"input_ids": [5, 6, 7, 8], "labels": [5, -100, -100, 8]},
    ]
    store = of_records(records, tmp_path, tiny_tokenizer, max_seq_len=3)
    assert rows(store) == [([5, 6, 7], [1, 2])]
    assert (store.meta["counts"]["cut"], store.meta["counts"]["dropped"]) == (1, 4)
    assert store.meta["counts"]["drops"] == [
        f"{tmp_path}/records.jsonl:1: labels: none of them is in the loss.",
        f"{tmp_path}/records.jsonl:3: labels: the first token in the loss is token 4, past max_seq_len: 3.",
        f"{tmp_path}/records.jsonl:4: input_ids: a prompt or a response has no tokens.",
        f"{tmp_path}/records.jsonl:5: labels: the first token in the loss is token 4, past max_seq_len: 3.",
    ]
