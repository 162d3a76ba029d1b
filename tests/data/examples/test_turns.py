"""Ids and what is trained of them, as llm-foundry 0.22.0 has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mptfoundry.data.examples.chat import Turns
from mptfoundry.data.examples.turns import Counts, ExampleMaker, ExamplePlan, Targets, stitch, tokenize
from mptfoundry.data.records.records import Part, Unit
from mptfoundry.tokenizer import load_tokenizer, train_bpe

PAIR = {"prompt": "Say é:", "response": " é é"}
CHAT = {
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u é"},
        {"role": "assistant", "content": "a"},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": " b "},
    ]
}
CHAT_TEXT = (
    "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu é<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    "<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n b <|im_end|>\n<|endoftext|>"
)
# What llm-foundry 0.22.0's tokenize_formatted_example and Seq2SeqFinetuningCollator gave for this tokenizer
# of 258 ids (its second form puts BOS before each text), padding taken off: record, targets, max_seq_len, the
# text of the ids, where labels begin and end to be trained.
MEASURED: list[tuple[str, dict[str, Any], Targets, int, str, list[int]]] = [
    ("plain", PAIR, Targets(), 64, "Say é: é é<|endoftext|>", [7, 14]),
    ("bos", PAIR, Targets(), 64, "<|endoftext|>Say é: é é<|endoftext|>", [8, 15]),
    ("plain", PAIR, Targets("length>=7"), 64, "Say é: é é<|endoftext|>", [0, 14]),
    ("plain", PAIR, Targets("length>=8"), 64, "Say é: é é<|endoftext|>", [7, 14]),
    ("plain", PAIR, Targets("all"), 10, "Say é: é", [0, 10]),
    ("plain", CHAT, Targets(), 512, CHAT_TEXT, [149, 164]),
    ("plain", CHAT, Targets("none", "all"), 512, CHAT_TEXT, [85, 97, 149, 164]),
    ("bos", CHAT, Targets("all", "all"), 512, CHAT_TEXT, [0, 164]),
    ("plain", CHAT, Targets("length>=60"), 512, CHAT_TEXT, [0, 85, 149, 164]),
    ("plain", CHAT, Targets("none", "all"), 90, CHAT_TEXT[:89], [85, 90]),
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An id for each byte: one that adds nothing to a text, and one that begins each with BOS."""
    from tokenizers.processors import TemplateProcessing

    folder = tmp_path_factory.mktemp("bytes")
    train_bpe(["a"], 258, folder)
    plain: Any = load_tokenizer(str(folder))
    bos: Any = load_tokenizer(str(folder))
    bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return {"plain": plain, "bos": bos}


def make(
    folder: Path, records: list[Any], tokenizer: Any, targets: Targets, max_seq_len: int, **options: Any
) -> tuple[list[tuple[np.ndarray, np.ndarray]], Counts]:
    """The examples of records in a file, and what became of them."""
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    preprocessing = options.get("preprocessing")
    plan = ExamplePlan(tokenizer, max_seq_len, targets, preprocessing, "uint16")
    size = path.stat().st_size
    result = ExampleMaker(plan)(Unit((Part("lines", str(path), 0, size),), size))
    return list(result.examples("uint16")), result.counts


@pytest.mark.parametrize(("kind", "record", "targets", "max_seq_len", "text", "borders"), MEASURED)
def test_ids_and_labels_are_those_of_llm_foundry(
    kind: str,
    record: dict[str, Any],
    targets: Targets,
    max_seq_len: int,
    text: str,
    borders: list[int],
    tokenizers: dict[str, Any],
    tmp_path: Path,
) -> None:
    ((ids, trained),), counts = make(tmp_path, [record], tokenizers[kind], targets, max_seq_len)
    assert tokenizers[kind].decode(ids) == text
    assert np.flatnonzero(np.diff(trained, prepend=False, append=False)).tolist() == borders
    assert counts.cut == (max_seq_len in (10, 90))


def test_eos_is_learned_and_put_there_once() -> None:
    for response in ([5], [5, 0]):
        ids, trained = stitch([([1, 2], [3]), ([4], response)], Targets(), eos_token_id=0)
        assert ids.tolist() == [1, 2, 3, 4, 5, 0]
        assert trained.tolist() == [False] * 4 + [True] * 2


def test_an_example_whose_learned_part_is_cut_away_is_dropped_and_named(
    tmp_path: Path, tokenizers: dict[str, Any]
) -> None:
    records = [PAIR, {"prompt": "long " * 9, "response": "x"}, CHAT]
    examples, counts = make(tmp_path, records, tokenizers["plain"], Targets(), 40)
    assert len(examples) == 1
    assert (counts.records, counts.dropped, counts.bad, counts.cut) == (3, 2, 0, 0)
    assert counts.drops == [
        f"{tmp_path}/records.jsonl:{line}: {field}: the first token in the loss is token {token}, past "
        "max_seq_len: 40."
        for line, field, token in ((2, "prompt", 46), (3, "messages", 150))
    ]


def test_bad_records_are_counted_and_the_first_five_are_named(tmp_path: Path, tokenizers: Any) -> None:
    path = tmp_path / "records.jsonl"
    make(tmp_path, [PAIR, {"prompt": 1, "response": "x"}, PAIR], tokenizers["plain"], Targets(), 64)
    lines = path.read_bytes() + b'{"prompt": \n{"prompt": "\xff"}\n' + b"7\n" * 4
    path.write_bytes(lines)
    plan = ExamplePlan(tokenizers["plain"], 64, Targets(), None, "uint16")
    result = ExampleMaker(plan)(Unit((Part("lines", str(path), 0, len(lines)),), 1))
    assert len(result.lengths) == 2
    assert (result.counts.records, result.counts.bad) == (9, 7)
    starts = [
        "2: prompt: is a number, not a text.",
        "4: this is not a line of JSON",
        "5: byte 12",
        "6: this is a",
    ]
    for problem, start in zip(result.counts.problems, [*starts, "7: this is a number"], strict=True):
        assert problem.startswith(f"{path}:{start}")


def test_columns_can_be_named_or_made_by_a_function(
    tmp_path: Path, tokenizers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    (tmp_path / "my_records.py").write_text(
        "def ask(row):\n    return {'prompt': row['q'] + '?', 'response': str(1 // row['n'])}\n"
    )
    rows = [{"q": "a", "n": 1}, {"q": "b", "n": 0}, {"q": None, "n": 1}]
    named = {"prompt": "q", "response": "q"}
    examples, counts = make(tmp_path, rows, tokenizers["plain"], Targets(), 64, preprocessing=named)
    assert [tokenizers["plain"].decode(ids) for ids, _ in examples] == ["aa<|endoftext|>", "bb<|endoftext|>"]
    assert counts.problems == [f"{tmp_path}/records.jsonl:3: q: is missing or null."]
    examples, counts = make(
        tmp_path, rows, tokenizers["plain"], Targets(), 64, preprocessing="my_records:ask"
    )
    assert [tokenizers["plain"].decode(ids) for ids, _ in examples] == ["a?1<|endoftext|>"]
    assert counts.bad == 2
    assert "2: preprocessing_fn: ZeroDivisionError: " in counts.problems[0]


def test_turns_that_llm_foundry_tokenized_are_taken_as_they_are(tmp_path: Path, tokenizers: Any) -> None:
    records = [{"turns": [{"input_ids": [5, 6], "labels": [7]}]}, {"input_ids": [5], "labels": [8, 0]}]
    examples, _ = make(tmp_path, records, tokenizers["plain"], Targets(), 64)
    assert [ids.tolist() for ids, _ in examples] == [[5, 6, 7, 0], [5, 8, 0]]


def test_records_of_both_kinds_keep_their_order(tokenizers: Any) -> None:
    from mptfoundry.data.examples.chat import turns_of

    records = [turns_of(record, tokenizers["plain"]) for record in (CHAT, PAIR, CHAT)]
    texts = [[len(prompt) for prompt, _ in turns] for turns in tokenize(records, tokenizers["plain"])]
    assert texts == [[85, 52], [7], [85, 52]]


@pytest.mark.parametrize("adds", ["nothing", "bos", "eos", "both", "pairs"])
def test_what_a_tokenizer_adds_stands_around_a_prompt_with_its_response(
    adding_tokenizers: dict[str, str], adds: str
) -> None:
    tokenizer: Any = load_tokenizer(adding_tokenizers[adds])
    (turns,) = tokenize([Turns([("one two", "three")], False, frozenset())], tokenizer)
    ids, trained = stitch(turns, Targets(), tokenizer.eos_token_id)
    prompt, response = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("one two", "three")
    )
    before = {"bos": [1], "both": [1], "pairs": [1, 0]}.get(adds, [])
    after = [0, 2] if adds == "pairs" else [2]
    assert ids.tolist() == [*before, *prompt, *response, *after]
    assert trained.tolist() == [False] * len(before + prompt) + [True] * len(response + after)


def test_text_that_spells_a_special_token_can_stay_text(
    adding_tokenizers: dict[str, str], tmp_path: Path
) -> None:
    tokenizer: Any = load_tokenizer(adding_tokenizers["bos"])
    chat = [{"role": "user", "content": "what is </s>?"}, {"role": "assistant", "content": "x"}]
    quiet = [{"role": "user", "content": "What?", "id": "</s>"}, chat[1]]
    records = [
        {"prompt": "a </s>", "response": "b <s>"},
        {"messages": chat},
        {"messages": quiet, "system": "Be </s>."},
        {"messages": quiet, "prompt": "</s>"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    unit = Unit((Part("lines", str(tmp_path / "a.jsonl"), 0, 1 << 20),), 1)
    made = {}
    for as_text in (False, True):
        plan = ExamplePlan(tokenizer, 512, Targets(), None, "uint16", as_text=as_text)
        made[as_text] = ExampleMaker(plan)(unit)
    ids = [next(each.examples("uint16"))[0].tolist() for each in made.values()]
    assert [[row.count(token) for token in (1, 2)] for row in ids] == [[2, 2], [1, 1]]
    assert made[False].counts.bad == 0
    assert made[True].counts.problems == [
        f"{tmp_path}/a.jsonl:2: messages[0].content: spells the special token </s>, which a conversation "
        "can't hold as text. Remove it, or use special_tokens: as_tokens.",
        f"{tmp_path}/a.jsonl:3: system: spells the special token </s>, which a conversation "
        "can't hold as text. Remove it, or use special_tokens: as_tokens.",
    ]
