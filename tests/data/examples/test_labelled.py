"""Labelled examples from their files to batches, and what is said of those that are none."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
import torch
from pyarrow import parquet

from mptfoundry.data import jobs
from mptfoundry.data.examples import labelled, labelled_store
from mptfoundry.data.examples.labelled_records import OUTSIDE, LabelledMaker, LabelledPlan
from mptfoundry.data.records import records
from mptfoundry.data.shards.token_ids import NOT_IN_LOSS
from mptfoundry.errors import DataError
from tests.loaders import head_of, labelled_loader

LABELS = {"no": 0, "maybe": 1, "yes": 2}
TEXTS = [{"text": f"def f{'x' * n}(self): return {n}", "label": [*LABELS][n % 3]} for n in range(11)]
WORDS = {"words": ["def", "first", "(", "naïve", ")", ":"], "labels": ["no", 2, "maybe", "yes", -100, 0]}
CONTEXT = "def total(left): return left * 7  # naïve 言葉"
QUESTION = {
    "question": "Which function?",
    "context": CONTEXT,
    "answers": {"text": ["total", "def total"], "answer_start": [4, 0]},
}

Build = Callable[..., Any]


@pytest.fixture
def build(tmp_path: Path, tiny_tokenizer: Any) -> Build:
    """The loader of some records, written as JSONL."""

    def make(records: list[dict[str, Any]], task: str = "sequence", **options: Any) -> Any:
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        given = {"local": str(tmp_path / "train.jsonl"), "labels": LABELS, "tokenizer": tiny_tokenizer}
        return labelled_loader(task, **{**given, "drop_last": False, **options})

    return make


def batches(spec: Any, epoch: int = 0) -> list[dict[str, Any]]:
    spec.dataloader.sampler.set_epoch(epoch)
    return list(spec.dataloader)


def texts_of(batch: dict[str, Any], tokenizer: Any) -> list[str]:
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"], dtype=torch.bool))
    return [tokenizer.decode(ids[own]) for ids, own in zip(batch["input_ids"], mask, strict=True)]


def test_texts_are_padded_to_the_longest_of_their_batch(build: Build, tiny_tokenizer: Any) -> None:
    spec = build(TEXTS)
    found = batches(spec)
    assert [len(batch["input_ids"]) for batch in found] == [4, 4, 3]
    assert [text for batch in found for text in texts_of(batch, tiny_tokenizer)] == [
        record["text"] for record in TEXTS
    ]
    assert torch.cat([batch["labels"] for batch in found]).tolist() == [n % 3 for n in range(11)]
    widths = [batch["input_ids"].shape[1] for batch in found]
    assert widths == sorted(widths) and widths[0] < widths[2]
    assert found[0]["attention_mask"][-1].all() and found[0]["max_documents"] == 1
    padding = found[0]["input_ids"][~found[0]["attention_mask"]]
    assert len(padding) and (padding == tiny_tokenizer.pad_token_id).all()
    count = spec.get_num_tokens_in_batch(found[0], token_type="total")
    assert count == found[0]["attention_mask"].sum()
    assert spec.get_num_tokens_in_batch(found[0], token_type="loss_generating") == 4


def test_rows_of_one_length_need_no_mask(build: Build) -> None:
    (batch,) = batches(build(TEXTS[:1]))
    assert set(batch) == {"input_ids", "labels", "row_tokens", "row_trained"}


def test_two_texts_are_joined_as_the_tokenizer_joins_pairs(build: Build, tiny_tokenizer: Any) -> None:
    records = [{"text": "left", "text_pair": "right", "label": 0}]
    (batch,) = batches(build(records))
    assert batch["input_ids"].tolist() == [tiny_tokenizer("left", "right")["input_ids"]]
    with pytest.raises(DataError, match=r"train.jsonl:2: text_pair: some records have it and others don't"):
        build([*records, {"text": "left", "label": 0}])


@pytest.mark.parametrize(
    ("problem", "labels", "given", "wanted"),
    [
        ("regression", {"LABEL_0": 0}, 2.5, 2.5),
        ("regression", {"a": 0, "b": 1}, [1, -2.5], [1.0, -2.5]),
        ("multi_label_classification", LABELS, ["yes", "no"], [1.0, 0.0, 1.0]),
        ("multi_label_classification", LABELS, [], [0.0, 0.0, 0.0]),
        ("multi_label_classification", LABELS, [0, 1, 0.0], [0.0, 1.0, 0.0]),
    ],
)
def test_labels_of_other_problems_are_floats(
    build: Build, problem: str, labels: dict[str, int], given: Any, wanted: Any
) -> None:
    spec = build([{"text": "x", "label": given}], problem=problem, labels=labels)
    (batch,) = batches(spec)
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [wanted]
    assert spec.get_num_tokens_in_batch(batch, token_type="loss_generating") == 1


def test_the_first_token_of_each_word_has_its_label(build: Build, tiny_tokenizer: Any) -> None:
    spec = build([WORDS, {"words": ["first"], "labels": ["yes"]}], "token")
    (batch,) = batches(spec)
    assert texts_of(batch, tiny_tokenizer)[0] == "def first ( naïve ) :"
    encoding = tiny_tokenizer("def first ( naïve ) :", return_offsets_mapping=True)
    labelled = [(i, int(label)) for i, label in enumerate(batch["labels"][0]) if label != NOT_IN_LOSS]
    starts = [encoding["offset_mapping"][i][0] for i, _ in labelled]
    assert starts == [0, 4, 10, 12, 20] and [label for _, label in labelled] == [0, 2, 1, 2, 0]
    assert (batch["labels"][1] != NOT_IN_LOSS).sum() == 1
    assert spec.get_num_tokens_in_batch(batch, token_type="loss_generating") == 6


def test_words_are_found_where_tokens_begin_with_a_space(build: Build, tmp_path: Path) -> None:
    """Some tokenizers' offsets have the space before a word, others don't."""
    from tokenizers.processors import ByteLevel

    from mptfoundry.tokenizer import load_tokenizer, train_bpe

    train_bpe(["def first ( naïve ) :"] * 9, 300, tmp_path / "other")
    tokenizer = load_tokenizer(str(tmp_path / "other"))
    found = []
    for trims in (True, False):
        tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=trims)
        found.append(batches(build([WORDS], "token", tokenizer=tokenizer))[0]["labels"])
    assert torch.equal(*found)


@pytest.mark.parametrize("max_seq_len", range(2, 20))
def test_where_the_start_is_truncated_words_that_keep_their_first_token_keep_their_label(
    build: Build, tiny_tokenizer: Any, max_seq_len: int
) -> None:
    (whole,) = batches(build([WORDS], "token", is_training=False))
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.truncation_side = "left"
    spec = build([WORDS], "token", tokenizer=tokenizer, max_seq_len=max_seq_len, is_training=False)
    (batch,) = batches(spec)
    for name in ("input_ids", "labels"):
        assert torch.equal(batch[name], whole[name][:, -max_seq_len:])


@pytest.mark.parametrize("answers", [QUESTION["answers"], [{"text": "total", "answer_start": 4}]])
def test_an_answer_is_its_first_and_its_last_token(build: Build, tiny_tokenizer: Any, answers: Any) -> None:
    spec = build([{**QUESTION, "answers": answers}, QUESTION], "span")
    (batch,) = batches(spec)
    first, last = int(batch["start_positions"][0]), int(batch["end_positions"][0])
    assert tiny_tokenizer.decode(batch["input_ids"][0][first : last + 1]).strip() == "total"
    (begin, _), (_, end) = batch["offsets"][0][first].tolist(), batch["offsets"][0][last].tolist()
    assert batch["context"][0][begin:end] == "total"
    assert batch["answers"][1] == ["total", "def total"]
    question = len(tiny_tokenizer(QUESTION["question"])["input_ids"])
    assert not batch["offsets"][0][:question].any() and batch["offsets"][0][question:, 1].all()
    assert spec.get_num_tokens_in_batch(batch, token_type="loss_generating") == 2


def test_what_is_too_long_is_cut_and_said(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    late = {**QUESTION, "answers": {"text": ["言葉"], "answer_start": [CONTEXT.index("言")]}}
    with caplog.at_level(logging.WARNING):
        spec = build([QUESTION, late], "span", max_seq_len=28)
    assert "max_seq_len: 28 truncates 2 examples; training skips 1 example without a label" in caplog.text
    (batch,) = batches(spec)
    assert batch["input_ids"].shape == (1, 28)
    (kept,) = batches(build([QUESTION, late], "span", max_seq_len=28, is_training=False))
    assert kept["start_positions"].tolist()[1] == kept["end_positions"].tolist()[1] == OUTSIDE


def test_the_order_is_that_of_seed_and_epoch(build: Build) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        spec = build([{"text": "x" * (n + 1), "label": 0} for n in range(11)], shuffle=True, seed=seed)
        return [int(row) for batch in batches(spec, epoch) for row in (batch["input_ids"] >= 0).sum(1)]

    one = build(TEXTS, shuffle=True, seed=1)
    assert [batch["labels"].tolist() for batch in batches(one, 1)] == [
        batch["labels"].tolist() for batch in batches(one, 1)
    ]
    assert order(1, 0) == order(1, 0) and order(1, 0) != order(1, 1) and order(1, 0) != order(2, 0)


def test_ranks_share_each_batch_that_one_rank_alone_would_have(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [{"text": "x", "label": float(n)} for n in range(16)]
    options = {"problem": "regression", "labels": {"LABEL_0": 0}, "shuffle": True}
    alone = [set(batch["labels"].tolist()) for batch in batches(build(records, **options))]
    shared: list[set[float]] = [set() for _ in alone]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(labelled, "once_per_node", lambda work, **_: work())
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        for number, batch in enumerate(batches(build(records, device_batch_size=2, **options))):
            shared[number] |= set(batch["labels"].tolist())
    assert shared == alone


def test_examples_are_made_once_and_found_again_by_content_and_settings(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(plan: LabelledPlan) -> None:
        raise TypeError("made again")

    first = build([WORDS] * 4, "token").dataloader.dataset
    with monkeypatch.context() as patch:
        patch.setattr(labelled_store, "LabelledMaker", refuse)
        again = build([WORDS] * 4, "token").dataloader.dataset
        for change in ({"max_seq_len": 63}, {"labels": {"no": 2, "maybe": 1, "yes": 0}}):
            with pytest.raises(TypeError, match="made again"):
                build([WORDS] * 4, "token", **change)
    assert again.fingerprints == first.fingerprints
    assert again[3]["labels"].tolist() == first[3]["labels"].tolist()
    (data,) = (tmp_path / ".cache").glob("*/examples.bin")
    data.write_bytes(bytes(data.stat().st_size))
    assert build([WORDS] * 4, "token").dataloader.dataset.fingerprints == first.fingerprints


@pytest.mark.parametrize("damaged", ["", "store/examples.bin", "state.json"])
def test_making_examples_continues_after_a_kill(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str
) -> None:
    expected = build(TEXTS).dataloader.dataset.fingerprints
    monkeypatch.setattr(records, "UNIT_BYTES", 100)
    monkeypatch.setattr(jobs, "SHORTEST_PERIOD_SECONDS", 1e-9)
    monkeypatch.setattr(jobs, "MOST_TIME_SAVING", 1e9)
    made: list[int] = []

    class Killed(LabelledMaker):
        def __call__(self, unit: Any) -> Any:
            made.append(unit.parts[0].start)
            if len(made) == 4:
                raise KeyboardInterrupt
            return super().__call__(unit)

    monkeypatch.setattr(labelled_store, "LabelledMaker", Killed)
    cache = str(tmp_path / ".killed")
    with pytest.raises(KeyboardInterrupt):
        build(TEXTS, cache_folder=cache)
    if damaged:
        (parts,) = (tmp_path / ".killed").glob("*.parts")
        (parts / damaged).write_bytes(b"")
    assert build(TEXTS, cache_folder=cache).dataloader.dataset.fingerprints == expected
    assert made[4] == (0 if damaged else made[3])
    assert len({path.name for path in (tmp_path / ".killed").iterdir()} - {"inputs"}) == 1


def test_what_makes_examples_can_be_sent_to_a_worker(tiny_tokenizer: Any) -> None:
    plan = LabelledPlan(tiny_tokenizer, 64, head_of("span"), {})
    assert pickle.loads(pickle.dumps(partial(LabelledMaker, plan)))().plan.head == plan.head


def test_all_formats_hold_the_same(build: Build, tmp_path: Path, tiny_tokenizer: Any) -> None:
    expected = batches(build(TEXTS))
    folder = tmp_path / "all"
    (folder / "parts").mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(TEXTS), folder / "train.parquet")
    for number in range(2):
        lines = [json.dumps(record) for record in TEXTS[6 * number : 6 * number + 6]]
        (folder / "parts" / f"{number}.jsonl").write_text("\n\n".join(lines) + "\n")
    saved = datasets.Dataset.from_list(TEXTS)
    saved.save_to_disk(folder / "saved")
    datasets.DatasetDict(train=saved).save_to_disk(folder / "splits")
    for name, split in [(".", "train"), (".", "parts"), ("saved", None), ("splits", "train")]:
        found = batches(build(TEXTS[:1], local=str(folder / name), split=split))
        assert len(found) == len(expected)
        assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(found, expected, strict=True))
    renamed = [{"sentence": record["text"], "kind": record["label"]} for record in TEXTS]
    found = batches(build(renamed, fields={"text": "sentence", "label": "kind"}))
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("task", "change", "text"),
    [
        ("sequence", {"text": None}, "text: is null. Remove the record, or fill it in"),
        ("sequence", {"text": 3}, "text: 3 is not a text with characters"),
        ("sequence", {"text": " "}, 'text: " " is not a text with characters'),
        ("sequence", {"text_pair": ""}, 'text_pair: "" is not a text with characters'),
        ("sequence", {"label": 3}, "label: 3 is not a label. Use 0 to 2, or a name: no, maybe, yes"),
        ("sequence", {"label": "often"}, 'label: "often" is not a label'),
        ("sequence", {"label": True}, "label: true is not a label"),
        ("sequence", {"label": 1.5}, "label: 1.5 is not a label"),
        ("token", {"words": "a b"}, 'words: "a b" is not a list with entries'),
        ("token", {"words": ["a", ""]}, "labels: there are 6 for 2 words"),
        ("token", {"words": ["a", ""], "labels": [0, 0]}, 'words: "" is not a text with characters'),
        ("sequence", {"text": "a\ud800"}, "text: holds half of a surrogate pair, which is not text"),
        ("token", {"words": ["\ud800"], "labels": [0]}, "words: holds half of a surrogate pair"),
        ("sequence", {"label": "\x1b[31m"}, r'label: "\\u001b\[31m" is not a label'),
        ("token", {"words": ["a"], "labels": [7]}, "labels: 7 is not a label"),
        ("span", {"question": ""}, "question: .* is not a text"),
        (
            "span",
            {"question": "why" * 99},
            r"question: has \d+ tokens; max_seq_len: 64 leaves no room for the context",
        ),
        ("span", {"answers": "total"}, r"answers: .* is not {text: \[...\], answer_start: \[...\]}"),
        (
            "span",
            {"answers": {"text": [], "answer_start": []}},
            "answers: has no text, or not one answer_start",
        ),
        ("span", {"answers": [{"text": "total"}]}, "answers: answer_start: null is not a whole number"),
        ("span", {"answers": {"text": ["nine"], "answer_start": [4]}}, 'answers: "nine" does not stand at 4'),
    ],
)
def test_a_record_that_holds_something_else_is_named(
    build: Build, task: str, change: dict[str, Any], text: str
) -> None:
    good = {"sequence": TEXTS[0], "token": WORDS, "span": QUESTION}[task]
    with pytest.raises(DataError, match=rf"train.jsonl:2: {text}"):
        build([good, {**good, **change}], task)


def test_examples_have_a_fingerprint_of_their_content(build: Build) -> None:
    prints = [
        build(records, task).dataloader.dataset.fingerprints["train_loader.dataset"]
        for records, task in (
            (TEXTS, "sequence"),
            (TEXTS, "sequence"),
            ([{**TEXTS[0], "label": "yes"}, *TEXTS[1:]], "sequence"),
            ([{**TEXTS[0], "text": TEXTS[0]["text"].replace("0", "1")}, *TEXTS[1:]], "sequence"),
            ([QUESTION], "span"),
            ([{**QUESTION, "answers": {"text": ["total", "left"], "answer_start": [4, 10]}}], "span"),
        )
    ]
    assert prints[0] == prints[1] and len(set(prints)) == 5


def test_a_column_that_is_missing_is_asked_for(build: Build) -> None:
    with pytest.raises(DataError, match=r"text: is missing; there are label. Name it: dataset.fields.text"):
        build([{"label": "no"}])


@pytest.mark.parametrize(
    ("problem", "labels", "label", "text"),
    [
        ("regression", {"LABEL_0": 0}, "high", '"high" is not a number'),
        ("regression", {"LABEL_0": 0}, [1.0], "is not a number"),
        ("regression", {"LABEL_0": 0}, 1e39, "1e.39 is not a number"),
        ("regression", {"LABEL_0": 0}, 10**400, "is not a number"),
        ("regression", {"a": 0, "b": 1}, 1.0, "1.0 is not a list of 2 numbers"),
        (
            "multi_label_classification",
            LABELS,
            1,
            "1 is not a list of 3 numbers, each 0 or 1, or a list of names",
        ),
        ("multi_label_classification", LABELS, [0, 1], "is not a list of 3 numbers"),
        ("multi_label_classification", LABELS, [0, 1, 2], "is not a list of 3 numbers, each 0 or 1"),
        ("multi_label_classification", LABELS, ["often"], '"often" is not a label'),
    ],
)
def test_a_label_of_another_problem_is_named(
    build: Build, problem: str, labels: dict[str, int], label: Any, text: str
) -> None:
    with pytest.raises(DataError, match=f"train.jsonl:1: label: .*{text}"):
        build([{"text": "x", "label": label}], problem=problem, labels=labels)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('{"text": "x", "label": 0', "train.jsonl:2: this is not a line of JSON"),
        ("[1]", r"train.jsonl:2: this is \[1\], not an object with fields"),
    ],
)
def test_a_line_that_is_no_record_is_named(build: Build, tmp_path: Path, content: str, text: str) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "train.jsonl").write_text(f"{json.dumps(TEXTS[0])}\n{content}\n")
    with pytest.raises(DataError, match=text):
        build(TEXTS, local=str(tmp_path / "train"))


def test_texts_may_be_bytes_of_utf8(build: Build, tmp_path: Path, tiny_tokenizer: Any) -> None:
    texts = [{"text": text, "label": 0} for text in ("é".encode(), b"\xff")]
    parquet.write_table(pyarrow.Table.from_pylist(texts[:1]), tmp_path / "good.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(texts), tmp_path / "bad.parquet")
    (batch,) = batches(build([], local=str(tmp_path / "good.parquet")))
    assert texts_of(batch, tiny_tokenizer) == ["é"]
    with pytest.raises(DataError, match=r"bad.parquet: row 1: text: byte 0 is not UTF-8"):
        build([], local=str(tmp_path / "bad.parquet"))


def test_a_place_without_examples_is_named(build: Build, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train_loader.dataset.split: .* has no val: .*There are train"):
        build(TEXTS, local=str(tmp_path), split="val")
    with pytest.raises(
        DataError,
        match=r"train_loader.dataset.split: train\[:2\]: only data sets on the hub",
    ):
        build(TEXTS, split="train[:2]")
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(DataError, match=r"bad.parquet: this is not a readable Parquet file"):
        build(TEXTS, local=str(tmp_path / "bad.parquet"))
    with pytest.raises(DataError, match="1 example can't fill one batch of 4"):
        build(TEXTS[:1], drop_last=True)
