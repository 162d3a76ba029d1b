"""Damaged and odd records never end in a traceback: each is counted as bad, or said in a sentence or two."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mptfoundry.config.data import FinetuningDatasetConfig
from mptfoundry.config.streams import RecordsConfig
from mptfoundry.data.examples import turns
from mptfoundry.data.examples.cache import prepare_examples
from mptfoundry.data.examples.labelled_records import LabelledMaker, LabelledPlan, pack, unpack
from mptfoundry.data.examples.store import ExampleStore
from mptfoundry.data.examples.turns import Counts, ExampleMaker, ExamplePlan, Targets, UnitExamples
from mptfoundry.data.records.records import plan_units
from mptfoundry.data.records.sources import find_records
from mptfoundry.data.views.example_preview import preview_examples
from mptfoundry.errors import DataError
from tests.fuzz import damaged_bytes, odd_values
from tests.loaders import context_of, head_of

TALK = [{"role": "user", "content": "a é"}, {"role": "assistant", "content": "b"}]
FINETUNING: list[dict[str, Any]] = [
    {"prompt": "Say é:", "response": "é", "id": 7},
    {"messages": [{"role": "system", "content": "s"}, *TALK, *TALK]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
    {"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 1}]},
    {"instruction": "i", "input": "j", "output": "o"},
    {"instruction": "i", "context": "c", "response": "r"},
    {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "attention_mask": [1, 1, 1, 1]},
    {"input_ids": [5, 6], "labels": [7, 8, 9]},
    {"turns": [{"input_ids": [5, 6], "labels": [7]}, {"input_ids": [8], "labels": [9]}]},
]
SEQUENCE, WORDS = "sequence", {"words": ["a", "é"], "labels": ["no", -100]}
ANSWER = {"question": "q?", "context": "an answer", "answers": {"text": ["answer"], "answer_start": [3]}}
LABELLED: list[tuple[str, str, dict[str, Any]]] = [
    (SEQUENCE, "single_label_classification", {"text": "a é", "text_pair": "b", "label": "no"}),
    (SEQUENCE, "multi_label_classification", {"text": "a", "label": ["no", "yes"]}),
    (SEQUENCE, "regression", {"text": "a", "label": [0.5, -1]}),
    ("token", "", WORDS),
    ("span", "", ANSWER),
    ("span", "", {**ANSWER, "answers": [{"text": "an", "answer_start": 0}]}),
]
# What mutations seldom make: half a surrogate pair, nesting, numbers beyond all types, not an object.
HARD = [
    *(
        '"\\ud800"',
        '{"a": "\\ud800"}',
        "1e400",
        "-1e39",
        "9" * 400,
        "[" * 900 + "]" * 900,
        "NaN",
        '"\\u001b[31m"',
    ),
    *("[" * 5_000, "9" * 5000, "{}", "[]", "[{}]", "null", "true", '{"\\ud800": 1}', '"' + "x" * 5_000 + '"'),
]


def variants(records: list[Any], seed: int, count: int) -> Iterator[str]:
    """Lines of JSON: each record with an odd value somewhere, or with one that is hard to read."""
    draw = random.Random(seed)
    for number, record in enumerate(records):
        for _, changed in odd_values(record, seed + number, count):
            yield json.dumps(changed)
        for _ in range(count):
            name = draw.choice([*record])
            value: Any = "HERE"
            if isinstance(record[name], list) and draw.random() < 0.5:
                value = [record[name][0], "HERE"]
            yield json.dumps({**record, name: value}).replace('"HERE"', draw.choice(HARD))
        yield json.dumps(record).replace('{"', '{"\\ud800', 1)
    yield from HARD


def assert_is_told(text: str) -> None:
    """It is a sentence or two, which any terminal can show."""
    assert len(text) < 600, text
    assert text.isprintable(), text
    assert text.encode()
    assert text.count(". ") <= 2, text


def assert_counted(made: ExampleStore | UnitExamples, counts: Counts, place: Path) -> None:
    """What was read of a file is an example, dropped, or bad."""
    examples = len(made) if isinstance(made, ExampleStore) else len(made.lengths)
    assert examples + counts.dropped + counts.bad == counts.records
    for text in counts.problems + counts.drops + counts.choices:
        assert_is_told(text.removeprefix(f"{place}:"))


def assert_finetuning_holds(
    folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, seed: int, values: int, files: int
) -> None:
    monkeypatch.setattr(turns, "MOST_PROBLEMS_KEPT", 10**6)
    path = folder / "records.jsonl"
    lines = list(variants(FINETUNING, seed, values))
    path.write_text("".join(f"{line}\n" for line in lines))
    source = RecordsConfig(local=str(path))
    dataset = FinetuningDatasetConfig(local=str(path), cache_folder=str(folder / "cache"))
    context = context_of(tokenizer, max_seq_len=256)
    made = prepare_examples("train_loader.dataset", source, dataset, context, workers=1, progress=False)
    store = ExampleStore(made)
    counts = Counts(**store.meta["counts"])
    assert_counted(store, counts, path)
    assert counts.records == len(lines) and preview_examples(store, tokenizer, max_seq_len=256).encode()
    whole = "".join(json.dumps(record) + "\n" for record in FINETUNING).encode()
    make = ExampleMaker(ExamplePlan(tokenizer, 256, Targets(), None, "uint16"))
    for said, data in damaged_bytes(whole, seed, files):
        path.write_bytes(data)
        try:
            for unit in plan_units(
                find_records(source, "train_loader.dataset", folder).inputs, [], cut_texts=False
            ):
                made = make(unit)
                assert_counted(made, made.counts, path)
        except DataError as error:
            assert_is_told(str(error))
        except Exception as error:
            raise AssertionError(f"seed {seed}, {said}") from error


def assert_labelled_holds(folder: Path, tokenizer: Any, seed: int, values: int, files: int) -> None:
    path = folder / "records.jsonl"
    for task, problem, record in LABELLED:
        whole = f"{json.dumps(record)}\n".encode() * 2
        contents = [line.encode() for line in variants([record], seed, values)]
        contents += [data for _, data in damaged_bytes(whole, seed, files)]
        for content in contents:
            path.write_bytes(content)
            try:
                inputs = find_records(RecordsConfig(local=str(path)), "x", folder).inputs
                make_labelled = LabelledMaker(LabelledPlan(tokenizer, 64, head_of(task, problem=problem), {}))
                for unit in plan_units(inputs, [], cut_texts=False):
                    for example in make_labelled(unit).examples:
                        assert pack(unpack(example)) == example
            except DataError as error:
                assert_is_told(str(error).removeprefix(f"{path}:"))
            except Exception as error:
                raise AssertionError(f"{task}, {problem}: {content[:200]!r}") from error


def test_odd_and_damaged_records_of_finetuning_are_counted(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_finetuning_holds(tmp_path, tiny_tokenizer, monkeypatch, seed=1, values=30, files=60)


def test_odd_and_damaged_labelled_records_are_said(tmp_path: Path, tiny_tokenizer: Any) -> None:
    assert_labelled_holds(tmp_path, tiny_tokenizer, seed=1, values=30, files=20)
