"""Encode text to the same ids as the tokenizers library, several times faster for some tokenizers.

A *word* is a piece that the pre-tokenizer splits off. In byte-level BPE with GPT-2's pattern (the tokenizers
of MPT, GPT-NeoX and `train_bpe`), the ids of a word depend only on the word, and words repeat a lot. So the
library encodes each word once, the ids are cached as bytes, and a text is the concatenation of its words. The
library also decides which characters are letters, digits or spaces, since Unicode tables differ between
libraries. All other tokenizers use the library for the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

from mptfoundry.tokenizer import backend_parts

LONGEST_KEPT_WORD = 64
MOST_KEPT_WORDS = 500_000
PIECE_CHARS = 1 << 20
ASCII_END = 0x80
PAGE = 0x400
PROBE = "a\tb  c\r\n\n   d'll 12x3 <|endoftext|> é é٣²½\u00a0\u0085.!?x_y\x1c\x1d \n e 's"


@lru_cache(1)
def make_encoder(tokenizer_json: str, dtype: str, as_text: bool) -> TextEncoder:
    """Return a cached encoder with its cache of words. The arguments are those of TextEncoder."""
    return TextEncoder(tokenizer_json, dtype, as_text=as_text)


class TextEncoder:
    """Encodes texts with one tokenizer, without the special tokens it adds by default.

    Args:
        tokenizer_json: Content of the tokenizer's `tokenizer.json`.
        dtype: Integer type of the ids that `encode` returns as bytes.
        as_text: Whether special tokens spelled out in the text are encoded as text.
    """

    def __init__(self, tokenizer_json: str, dtype: str, *, as_text: bool = False) -> None:
        self.tokenizer: Tokenizer = Tokenizer.from_str(tokenizer_json)
        self.tokenizer.encode_special_tokens = as_text
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.dtype = np.dtype(dtype)
        self.words = _WordCache(self.tokenizer, self.dtype)
        self.splitter: WordSplitter | None = None
        if works_word_by_word(self.tokenizer):
            self.splitter = WordSplitter(self.tokenizer)
            if self.encode(PROBE) != self.encode_whole(PROBE):
                self.splitter = None
        self.words.clear()

    @property
    def can_cut(self) -> bool:
        """Whether a long text may be split at `SAFE_CUT` and encoded in pieces."""
        return self.splitter is not None and self.splitter.can_cut

    def encode(self, text: str) -> bytes:
        """Return the ids of one text, as the bytes of an array of `dtype`."""
        if self.splitter is None:
            return self.encode_whole(text)
        ids = b"".join(
            b"".join(map(self.words.__getitem__, self.splitter.split(piece))) for piece in self._pieces(text)
        )
        if len(self.words) > MOST_KEPT_WORDS:
            self.words.clear()
        return ids

    def encode_whole(self, text: str) -> bytes:
        """Like `encode`, but with a single call to the library."""
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False).ids, self.dtype).tobytes()

    def _pieces(self, text: str) -> Iterator[str]:
        start = 0
        while self.can_cut and len(text) - start > PIECE_CHARS:
            found = SAFE_CUT.search(text, start + PIECE_CHARS)
            if found is None:
                break
            yield text[start : found.end()]
            start = found.end()
        yield text[start:] if start else text


# A newline before a letter: the pre-tokenizer always splits here, and no Unicode composition crosses it.
SAFE_CUT = re.compile(r"\n(?=[A-Za-z])")


class WordSplitter:
    """Splits text into the same words as the tokenizer.

    Each added token is a word of its own and ends the text before it, as in the library.

    Args:
        tokenizer: A tokenizer for which `works_word_by_word` is true.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = _tokens_in_text(tokenizer).values()
        self.tokenizer = tokenizer
        self.can_cut = not any("\n" in token.content for token in added)
        self.normalize = tokenizer.normalizer.normalize_str if tokenizer.normalizer else None
        # The library searches for the first kind in the raw text, for the second after normalization.
        self.raw_tokens = _alternatives([token.content for token in added if not token.normalized])
        self.normalized_tokens = _alternatives([token.content for token in added if token.normalized])
        self.letters: list[tuple[int, int]] = []
        self.digits: list[tuple[int, int]] = []
        self.spaces: list[tuple[int, int]] = []
        self.known: list[tuple[int, int]] = []
        self._learn(0, ASCII_END)
        self.find_ascii_words = self.find_words

    def split(self, text: str) -> list[str]:
        """Split a text into words; joined, they are the normalized text."""
        words: list[str] = []
        for position, segment in enumerate(self.raw_tokens.split(text) if self.raw_tokens else [text]):
            if position % 2:
                words.append(segment)
            else:
                self._split_segment(segment, words)
        return words

    def _split_segment(self, segment: str, words: list[str]) -> None:
        find_words = self.find_ascii_words
        if not segment.isascii():
            segment = self.normalize(segment) if self.normalize else segment
            self._learn_characters(segment)
            find_words = self.find_words
        if self.normalized_tokens is None:
            words += find_words(segment)
            return
        for position, part in enumerate(self.normalized_tokens.split(segment)):
            if position % 2:
                words.append(part)
            elif part:
                words += find_words(part)

    def _learn_characters(self, text: str) -> None:
        found = self.unknown.search(text)
        while found:
            start = ord(found.group()) // PAGE * PAGE
            self._learn(max(start, ASCII_END), start + PAGE)
            found = self.unknown.search(text)

    def _learn(self, start: int, stop: int) -> None:
        """Get the classes of characters `start` to `stop` - 1 from the library and rebuild the patterns."""
        classes = _classes_of_characters(self.tokenizer, start, stop)
        for name, ranges in (("L", self.letters), ("N", self.digits), ("S", self.spaces)):
            ranges += _ranges([code for code, its_class in classes.items() if its_class == name])
        self.known.append((start, stop - 1))
        letter, digit, space = map(_class_text, (self.letters, self.digits, self.spaces))
        # GPT-2's pattern, but letters come before contractions. This is faster and safe, since contractions
        # don't start with a letter.
        pattern = (
            f" ?[{letter}]+| ?[{digit}]+|'(?:s|t|re|ve|m|ll|d)| ?[^{space}{letter}{digit}]+"
            f"|[{space}]+(?![^{space}])|[{space}]+"
        )
        self.find_words = re.compile(pattern).findall
        self.unknown = re.compile(f"[^{_class_text(self.known)}]")


def works_word_by_word(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer is byte-level BPE with GPT-2's pattern and encodes each word independently."""
    parts = backend_parts(tokenizer)
    model, pre_tokenizer, normalizer = parts["model"], parts["pre_tokenizer"], parts["normalizer"]
    return (
        model.get("type") == "BPE"
        and not any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and pre_tokenizer is not None
        and pre_tokenizer["type"] == "ByteLevel"
        and pre_tokenizer.get("use_regex", True)
        and not pre_tokenizer["add_prefix_space"]
        and (normalizer is None or normalizer["type"] == "NFC")
        and not any(
            token["lstrip"] or token["rstrip"] or token["single_word"] or not token["content"]
            for token in parts["added_tokens"]
        )
    )


class _WordCache(dict):
    """Cache of word -> bytes of its ids, computed with the library's model."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        super().__init__()
        self.model = tokenizer.model
        self.dtype = dtype
        self.added = {token.content: number for number, token in _tokens_in_text(tokenizer).items()}

    def __missing__(self, word: str) -> bytes:
        if word in self.added:
            numbers = [self.added[word]]
        else:
            shown = word.encode("utf-8").decode("latin-1").translate(BYTE_CHARACTERS)
            numbers = [token.id for token in self.model.tokenize(shown)]
        ids = np.array(numbers, self.dtype).tobytes()
        if len(word) <= LONGEST_KEPT_WORD:
            self[word] = ids
        return ids


def _tokens_in_text(tokenizer: Tokenizer) -> dict[int, AddedToken]:
    """Return the added tokens that are recognized in text."""
    added = tokenizer.get_added_tokens_decoder().items()
    return {
        number: token for number, token in added if not (token.special and tokenizer.encode_special_tokens)
    }


def _byte_characters() -> dict[int, str]:
    """Map each byte to its character in byte-level BPE: the same one if visible, else one past 255."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + n) for n, byte in enumerate(hidden)}


BYTE_CHARACTERS = _byte_characters()


def _alternatives(contents: list[str]) -> re.Pattern[str] | None:
    """Compile a pattern that captures the longest matching text; None if there are no texts."""
    if not contents:
        return None
    return re.compile(f"({'|'.join(re.escape(text) for text in sorted(contents, key=len, reverse=True))})")


def _classes_of_characters(tokenizer: Tokenizer, start: int, stop: int) -> dict[int, str]:
    """Find which characters the pre-tokenizer treats as letter, number or space (L, N, S; others left out).

    Each character is placed after a letter, after a digit, and between a space and a letter. Where the
    library splits this text determines the class.
    """
    codes = [code for code in range(start, stop) if not 0xD800 <= code <= 0xDFFF]
    layout = "a{0}1{0} {0}"
    pre_tokenizer: Any = tokenizer.pre_tokenizer
    pieces = pre_tokenizer.pre_tokenize_str("".join(layout.format(chr(code)) for code in codes) + "a")
    width = len(layout.format("x"))
    is_cut = np.zeros(width * len(codes) + 2, bool)
    is_cut[[begin for _, (begin, _) in pieces]] = True
    cuts = is_cut[:-2].reshape(len(codes), width)
    classes = {}
    for code, after_letter, after_digit, after_space in zip(codes, *cuts[:, [1, 3, 5]].T, strict=True):
        if not after_letter:
            classes[code] = "L"
        elif not after_digit:
            classes[code] = "N"
        elif after_space:
            classes[code] = "S"
    return classes


def _ranges(codes: list[int]) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for code in codes:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1] = (ranges[-1][0], code)
        else:
            ranges.append((code, code))
    return ranges


def _class_text(ranges: list[tuple[int, int]]) -> str:
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)
