"""People see what is learned, how long examples are, and what was left out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mptfoundry.data.example_preview import histogram, preview_examples, show_learned
from mptfoundry.data.examples import ExampleStore, write_examples
from mptfoundry.data.turns import Counts


def test_learned_tokens_are_marked_in_brackets_or_green(tiny_tokenizer: Any) -> None:
    prompt, response = (tiny_tokenizer(text)["input_ids"] for text in ("Why? ", "Because."))
    ids = np.array([*prompt, *response, tiny_tokenizer.eos_token_id])
    learned = np.arange(len(ids)) >= len(prompt)
    assert show_learned(ids, learned, tiny_tokenizer) == "Why? ⟦Because.<|endoftext|>⟧"
    colored = show_learned(ids, learned, tiny_tokenizer, color=True)
    assert colored == "Why? \x1b[32mBecause.<|endoftext|>\x1b[0m"


def test_long_texts_are_cut_inside_their_marks(tiny_tokenizer: Any) -> None:
    ids = np.array(tiny_tokenizer("word " * 1000)["input_ids"])
    text = show_learned(ids, np.ones(len(ids), bool), tiny_tokenizer)
    assert len(text) < 1300 and text.startswith("⟦word") and text.endswith("⟧")


def test_the_histogram_counts_every_length() -> None:
    lines = histogram([1, 5, 10, 10, 100]).splitlines()
    assert lines[0] == "tokens of an example"
    assert lines[1] == f"    1 to  10  {'█' * 40} 4"
    assert lines[2] == "   11 to  20   0"
    assert lines[-1] == f"   91 to 100  {'█' * 10} 1"
    assert histogram([]) == "no examples"


def test_what_was_cut_dropped_or_bad_is_told_with_its_reasons(tmp_path: Path, tiny_tokenizer: Any) -> None:
    counts = Counts(10, 2, ["a.jsonl:2: prompt: is empty."], 3, ["a.jsonl:5: prompt: past."], 1, 0, ["id"])
    with write_examples(tmp_path / "store", vocab_size=320) as writer:
        for _ in range(5):
            writer.add(np.array([5, 6, 7]), np.array([False, True, True]))
        writer.meta = {"counts": asdict(counts)}
    text = preview_examples(ExampleStore(tmp_path / "store"), tiny_tokenizer, max_seq_len=64, samples=2)
    assert text.startswith("5 examples of 10 records; 15 tokens, of which 10 are learned (66.7%)")
    for line in (
        "cut at max_seq_len, 64: 1 (10.0%)",
        "dropped, since nothing to learn is left: 3 (30.0%)\n  a.jsonl:5: prompt: past.",
        "bad records: 2 (20.0%)\n  a.jsonl:2: prompt: is empty.",
        "columns not looked at: id",
        "example 0 of 5: 3 tokens, 2 learned",
        "example 4 of 5: 3 tokens, 2 learned",
    ):
        assert line in text
