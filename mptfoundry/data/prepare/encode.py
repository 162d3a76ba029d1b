"""From text to token ids: the ids of the tokenizers library, several times faster where that is possible.

A *word* is what the pre-tokeniser cuts off. In byte-level BPE with GPT-2's pattern (MPT's and GPT-NeoX's
tokenizer, and those that `train_bpe` makes) the ids of a word depend on the word alone, and text repeats its
words: so each word is given to the library once, kept as bytes, and a text is the join of its words. Which
characters are letters, digits or spaces is asked of the library as well, since Unicode's tables differ
between libraries. Every other tokenizer runs through the library as a whole.
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
    """The encoder of a tokenizer, which is kept with the words it has seen; arguments are TextEncoder's."""
    return TextEncoder(tokenizer_json, dtype, as_text=as_text)


class TextEncoder:
    """Encode texts with one tokenizer, without the special tokens that it may add on its own.

    Args:
        tokenizer_json: Content of the tokenizer's `tokenizer.json`.
        dtype: Integer type of the ids that `encode` returns, as bytes.
        as_text: Text that spells a special token stays text, instead of becoming that token.
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
        """Whether a long text may be encoded in the pieces that `cut` gives."""
        return self.splitter is not None and self.splitter.can_cut

    def encode(self, text: str) -> bytes:
        """The ids of one text, as the bytes of an array of `dtype`."""
        if self.splitter is None:
            return self.encode_whole(text)
        ids = b"".join(
            b"".join(map(self.words.__getitem__, self.splitter.split(piece))) for piece in self._pieces(text)
        )
        if len(self.words) > MOST_KEPT_WORDS:
            self.words.clear()
        return ids

    def encode_whole(self, text: str) -> bytes:
        """As `encode`, by one call of the library."""
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


# A line's end before a letter: the pre-tokeniser cuts there whatever surrounds it, and nothing composes
# across it.
SAFE_CUT = re.compile(r"\n(?=[A-Za-z])")


class WordSplitter:
    """Cut text into the words that the tokenizer cuts it into.

    Added tokens are words of their own; they end the text before them, as in the library.

    Args:
        tokenizer: One for which `works_word_by_word` is true.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = _tokens_in_text(tokenizer).values()
        self.tokenizer = tokenizer
        self.can_cut = not any("\n" in token.content for token in added)
        self.normalize = tokenizer.normalizer.normalize_str if tokenizer.normalizer else None
        # The library looks for these in the text as it is, and for those after normalisation.
        self.raw_tokens = _alternatives([token.content for token in added if not token.normalized])
        self.normalized_tokens = _alternatives([token.content for token in added if token.normalized])
        self.letters: list[tuple[int, int]] = []
        self.digits: list[tuple[int, int]] = []
        self.spaces: list[tuple[int, int]] = []
        self.known: list[tuple[int, int]] = []
        self._learn(0, ASCII_END)
        self.find_ascii_words = self.find_words

    def split(self, text: str) -> list[str]:
        """The words of a text, in order; joined they give the normalised text."""
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
        """Ask the library for the classes of the characters `start` to `stop` - 1; rebuild the patterns."""
        classes = _classes_of_characters(self.tokenizer, start, stop)
        for name, ranges in (("L", self.letters), ("N", self.digits), ("S", self.spaces)):
            ranges += _ranges([code for code, its_class in classes.items() if its_class == name])
        self.known.append((start, stop - 1))
        letter, digit, space = map(_class_text, (self.letters, self.digits, self.spaces))
        # GPT-2's pattern. Letters come before the contractions, which begin with no letter: it is faster.
        pattern = (
            f" ?[{letter}]+| ?[{digit}]+|'(?:s|t|re|ve|m|ll|d)| ?[^{space}{letter}{digit}]+"
            f"|[{space}]+(?![^{space}])|[{space}]+"
        )
        self.find_words = re.compile(pattern).findall
        self.unknown = re.compile(f"[^{_class_text(self.known)}]")


def works_word_by_word(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer is byte-level BPE with GPT-2's pattern and nothing that reaches across words."""
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
    """Word -> bytes of its ids, filled by the library's model as the library itself would ask it."""

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
    """The added tokens that a text can spell."""
    added = tokenizer.get_added_tokens_decoder().items()
    return {
        number: token for number, token in added if not (token.special and tokenizer.encode_special_tokens)
    }


def _byte_characters() -> dict[int, str]:
    """The character by which byte-level BPE shows a byte: its own if that is visible, else one past 255."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + n) for n, byte in enumerate(hidden)}


BYTE_CHARACTERS = _byte_characters()


def _alternatives(contents: list[str]) -> re.Pattern[str] | None:
    """Match the longest of several texts, in a group of its own; None if there is none."""
    if not contents:
        return None
    return re.compile(f"({'|'.join(re.escape(text) for text in sorted(contents, key=len, reverse=True))})")


def _classes_of_characters(tokenizer: Tokenizer, start: int, stop: int) -> dict[int, str]:
    """Which of letter, number, space the pre-tokeniser takes each character for (L, N, S; others left out).

    Each character stands after a letter, after a digit, and between a space and a letter: where the library
    cuts tells its class.
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
