"""People see what is trained, how long examples are, and what was left out."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from mptfoundry.data.examples.store import ExampleStore, write_examples
from mptfoundry.data.examples.turns import Counts
from mptfoundry.data.views.example_preview import histogram, preview_examples, show_trained, split_marks
from mptfoundry.tokenizer import count_ids, load_tokenizer


def test_learned_tokens_are_marked_in_brackets_or_green(tiny_tokenizer: Any) -> None:
    prompt, response = (tiny_tokenizer(text)["input_ids"] for text in ("Why? ", "Because."))
    ids = np.array([*prompt, *response, tiny_tokenizer.eos_token_id])
    trained = np.arange(len(ids)) >= len(prompt)
    assert show_trained(ids, trained, tiny_tokenizer) == "Why? ⟦Because.<|endoftext|>⟧"
    colored = show_trained(ids, trained, tiny_tokenizer, color=True)
    assert colored == "Why? \x1b[32mBecause.<|endoftext|>\x1b[0m"


def test_long_texts_are_cut_inside_their_marks(tiny_tokenizer: Any) -> None:
    ids = np.array(tiny_tokenizer("word " * 1000)["input_ids"])
    text = show_trained(ids, np.ones(len(ids), bool), tiny_tokenizer)
    assert len(text) < 1300 and text.startswith("⟦word") and text.endswith("⟧")


def test_the_histogram_counts_every_length() -> None:
    lines = histogram([1, 5, 10, 10, 100]).splitlines()
    assert lines[0] == "tokens of an example"
    assert lines[1] == f"    1 to  10  {'█' * 40} 4"
    assert lines[2] == "   11 to  20   0"
    assert lines[-1] == f"   91 to 100  {'█' * 10} 1"
    assert histogram([]) == "no examples"


def test_what_was_cut_dropped_or_bad_is_told_with_its_reasons(tmp_path: Path, tiny_tokenizer: Any) -> None:
    counts = Counts(10, 2, ["a.jsonl:2: prompt: is empty."], 3, ["a.jsonl:5: prompt: past."], 1, 0)
    counts = replace(
        counts, ignored={"id": 8, "prompt": 1}, doubles=1, choices=["a.jsonl:7: messages is read."]
    )
    with write_examples(tmp_path / "store", vocab_size=320) as writer:
        for _ in range(5):
            writer.add(np.array([5, 6, 7]), np.array([False, True, True]))
        writer.meta = {"counts": asdict(counts)}
    text = preview_examples(ExampleStore(tmp_path / "store"), tiny_tokenizer, max_seq_len=64, samples=2)
    assert text.startswith("5 examples of 10 records; 15 tokens, of which 10 are in the loss (66.7%)")
    for line in (
        "cut at max_seq_len, 64: 1 (10.0%)",
        "dropped: 3 (30.0%)\n  a.jsonl:5: prompt: past.",
        "bad records: 2 (20.0%)\n  a.jsonl:2: prompt: is empty.\n  ... and 1 more",
        "records of two forms, of which one is read: 1 (10.0%)\n  a.jsonl:7: messages is read.",
        "columns not looked at: id, prompt (in 1 record)",
        "example 0 of 5: 3 tokens, 2 in the loss",
        "example 4 of 5: 3 tokens, 2 in the loss",
    ):
        assert line in text


def test_one_of_a_kind_is_called_one(tmp_path: Path, tiny_tokenizer: Any) -> None:
    with write_examples(tmp_path / "store", vocab_size=320) as writer:
        writer.add(np.array([5]), np.array([True]))
        writer.meta = {"counts": asdict(Counts(records=1))}
    text = preview_examples(ExampleStore(tmp_path / "store"), tiny_tokenizer, max_seq_len=64)
    assert text.startswith("1 example of 1 record; 1 token, of which 0 are in the loss (0.0%)")
    assert "example 0 of 1: 1 token, 0 in the loss" in text


def test_marks_of_the_chat_template_that_are_split_get_a_note_whose_cure_works(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    tokenizer: Any = load_tokenizer(str(tokenizer_folder))
    note = split_marks(tokenizer)
    assert note.startswith("note: the chat template writes <|im_start|> (")
    assert note.endswith("a vocab_size of 322 or more.")
    call = note[note.index("tokenizer.add_tokens(") : note.index(", tokenizer.save_pretrained")]
    eval(call, {"tokenizer": tokenizer})
    tokenizer.save_pretrained(tmp_path / "own")
    assert split_marks(load_tokenizer(str(tmp_path / "own"))) == ""
    assert count_ids(tokenizer) == 322
