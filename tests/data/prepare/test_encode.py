from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from mptfoundry.data.prepare import encode
from mptfoundry.data.prepare.encode import TextEncoder, works_word_by_word


@pytest.fixture
def trained(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))


@pytest.fixture
def with_space_runs(trained: Tokenizer) -> Tokenizer:
    """As GPT-NeoX's: runs of spaces are tokens of their own, found after normalisation."""
    trained.add_tokens([AddedToken(" " * count, normalized=True) for count in range(8, 1, -1)])
    return trained


def ids(encoder: TextEncoder, text: str) -> list[int]:
    return np.frombuffer(encoder.encode(text), encoder.dtype).tolist()


def random_texts(count: int) -> list[str]:
    """Short texts in which everything that a pre-tokeniser looks at meets everything else."""
    ranges = [
        (0x01, 0x250),
        (0x300, 0x370),
        (0x600, 0x660),
        (0x4E00, 0x4E10),
        (0x1F600, 0x1F610),
        (0x20000, 0x20008),
    ]
    characters = [chr(code) for start, stop in ranges for code in range(start, stop)]
    characters += [
        "\u1100",
        "\u1161",
        "\u2028",
        "\u3000",
        "\ufeff",
        "\u200b",
        "\u212a",
        "\U000e0001",
        "\U0001e900",
    ]
    frequent = [
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "a",
        "B",
        "z",
        "0",
        "9",
        "_",
        "-",
        "'s",
        "'ll",
        "<|endoftext|>",
    ]
    rng = random.Random(7)
    draw = lambda: rng.choice(frequent if rng.random() < 0.6 else characters)  # noqa: E731
    return ["".join(draw() for _ in range(rng.randrange(1, 30))) for _ in range(count)]


def test_ids_are_those_of_the_library_for_every_kind_of_character(with_space_runs: Tokenizer) -> None:
    encoder = TextEncoder(with_space_runs.to_str(), "uint16")
    assert encoder.splitter is not None
    for text in random_texts(1500):
        assert ids(encoder, text) == with_space_runs.encode(text, add_special_tokens=False).ids, repr(text)


def test_ids_are_those_of_the_library_without_a_normalizer(trained: Tokenizer) -> None:
    trained = Tokenizer.from_str(json.dumps({**json.loads(trained.to_str()), "normalizer": None}))
    encoder = TextEncoder(trained.to_str(), "uint32")
    assert encoder.splitter is not None
    for text in random_texts(500):
        assert ids(encoder, text) == trained.encode(text, add_special_tokens=False).ids, repr(text)


def test_ids_of_spelled_special_tokens_are_those_of_the_library_as_text(with_space_runs: Tokenizer) -> None:
    encoder = TextEncoder(with_space_runs.to_str(), "uint16", as_text=True)
    assert encoder.splitter is not None
    with_space_runs.encode_special_tokens = True
    try:
        spelled = [token.content for token in with_space_runs.get_added_tokens_decoder().values()]
        for text in ("".join(pair) for pair in zip(random_texts(300), spelled * 300, strict=False)):
            assert ids(encoder, text) == with_space_runs.encode(text, add_special_tokens=False).ids, repr(
                text
            )
    finally:
        with_space_runs.encode_special_tokens = False


def test_ids_of_source_files_are_those_of_the_library(
    with_space_runs: Tokenizer, corpus_texts: list[str]
) -> None:
    encoder = TextEncoder(with_space_runs.to_str(), "uint16")
    for text in corpus_texts:
        assert ids(encoder, text) == with_space_runs.encode(text, add_special_tokens=False).ids


def test_a_long_text_is_encoded_in_pieces_with_the_same_ids(
    with_space_runs: Tokenizer, corpus_texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n".join(corpus_texts)
    monkeypatch.setattr(encode, "PIECE_CHARS", 500)
    encoder = TextEncoder(with_space_runs.to_str(), "uint16")
    assert encoder.splitter is not None
    pieces, split = [], encoder.splitter.split
    monkeypatch.setattr(encoder.splitter, "split", lambda piece: (pieces.append(piece), split(piece))[1])
    assert ids(encoder, text) == with_space_runs.encode(text, add_special_tokens=False).ids
    assert len(pieces) > 20 and "".join(pieces) == text


def test_a_full_cache_of_words_changes_nothing(
    trained: Tokenizer, corpus_texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "MOST_KEPT_WORDS", 10)
    encoder = TextEncoder(trained.to_str(), "uint16")
    for text in corpus_texts:
        assert ids(encoder, text) == trained.encode(text, add_special_tokens=False).ids
        assert len(encoder.words) <= 10


def test_truncation_and_padding_left_in_a_tokenizer_are_not_applied(trained: Tokenizer) -> None:
    trained.enable_truncation(3)
    trained.enable_padding(length=50)
    encoder = TextEncoder(trained.to_str(), "uint16")
    trained.no_truncation()
    trained.no_padding()
    assert ids(encoder, "one two three four") == trained.encode("one two three four").ids


def _prefix_space(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def _other_pattern(tokenizer: Tokenizer) -> None:
    split: Any = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _stripping_token(tokenizer: Tokenizer) -> None:
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])


@pytest.mark.parametrize("change", [_prefix_space, _other_pattern, _stripping_token])
def test_a_tokenizer_of_another_kind_runs_through_the_library(trained: Tokenizer, change: Any) -> None:
    change(trained)
    assert not works_word_by_word(trained)
    encoder = TextEncoder(trained.to_str(), "uint16")
    assert not encoder.can_cut
    for text in [*random_texts(50), "a <mask> b12"]:
        assert ids(encoder, text) == trained.encode(text, add_special_tokens=False).ids


def test_an_added_token_across_lines_forbids_cutting(trained: Tokenizer) -> None:
    trained.add_tokens(["end\nbegin"])
    encoder = TextEncoder(trained.to_str(), "uint16")
    assert encoder.splitter is not None and not encoder.can_cut
    assert ids(encoder, "x end\nbegin y") == trained.encode("x end\nbegin y", add_special_tokens=False).ids
