"""Show what a model will read: decoded samples with visible special tokens and document boundaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mptfoundry.data.shards.index import ShardIndex, read_index, read_samples
from mptfoundry.data.shards.token_ids import check_ids, read_sample
from mptfoundry.errors import DataError
from mptfoundry.tokenizer import (
    Borders,
    adds_in_words,
    count_ids,
    documents_in_words,
    fingerprint,
    load_tokenizer,
    own_borders,
    spelled,
)

MOST_CHARACTERS = 1200
BORDER = "┈┈┈┈┈┈┈┈"
MARKED, PLAIN = "\x1b[7m", "\x1b[0m"


def preview(
    folder: str | Path,
    *,
    samples: int = 3,
    tokenizer: str | None = None,
    tokenizer_kwargs: Mapping[str, Any] | None = None,
    token_encoding_type: str = "int64",
    as_text: bool = False,
    color: bool = False,
) -> str:
    """Describe a folder of shards and decode evenly spaced samples.

    Args:
        folder: The folder of one split.
        samples: How many samples to show.
        tokenizer: Name or folder of a tokenizer. Defaults to the one named in the shards.
        tokenizer_kwargs: The same as for `load_tokenizer`.
        token_encoding_type: Type of ids stored as bytes.
        as_text: Whether special tokens spelled out in raw text are encoded as text.
        color: Whether to mark special tokens with terminal colors.

    Raises:
        ConfigError: The tokenizer can't be loaded.
        DataError: The folder can't be read, or the tokenizer is unknown.
    """
    index = read_index(folder, str(folder))
    name = tokenizer or (index.meta.tokenizer if index.meta else None)
    if name is None:
        raise DataError(
            f"{folder}: the shards don't say with which tokenizer they were made. Give tokenizer."
        )
    reader: Any = load_tokenizer(name, tokenizer_kwargs)
    blocks = [f"{_describe(index)}\n{_borders_in_words(index, reader)}"]
    if index.meta and index.meta.fingerprint != fingerprint(reader):
        blocks.append(
            f"note: {name} is not the tokenizer that these shards were made with ({index.meta.tokenizer}): "
            "the decoded text may be wrong, and a run refuses these shards with this tokenizer."
        )
    numbers = sorted({round(at) for at in np.linspace(0, index.samples - 1, min(samples, index.samples))})
    for number, sample in zip(numbers, read_samples(index, numbers), strict=True):
        ids = _ids(sample, reader, token_encoding_type, as_text, f"{index.folder}: sample {number:,}")
        blocks.append(f"sample {number:,} of {index.samples:,}: {show(ids, reader, color=color)}")
    return "\n\n".join(blocks)


def preview_batch(batch: Mapping[str, Any], tokenizer: Any, *, samples: int = 3, color: bool = False) -> str:
    """Decode the first rows of a batch, without padding."""
    blocks = []
    for row, ids in enumerate(batch["input_ids"][:samples].tolist()):
        kept = batch["attention_mask"][row].tolist() if "attention_mask" in batch else [True] * len(ids)
        text = [token_id for token_id, is_text in zip(ids, kept, strict=True) if is_text]
        blocks.append(f"row {row} of {len(batch['input_ids'])}: {show(text, tokenizer, color=color)}")
    return "\n\n".join(blocks)


def show(ids: Sequence[int], tokenizer: Any, *, color: bool = False) -> str:
    """Format a sample: counts, then text with a line after each document; long text is cut in the middle."""
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    pieces: list[str] = []
    lengths: list[int] = []
    run: list[int] = []
    length = 0
    for token_id in ids:
        length += 1
        if token_id not in special:
            run.append(token_id)
            continue
        token = tokenizer.convert_ids_to_tokens(token_id)
        pieces += [
            tokenizer.decode(run, clean_up_tokenization_spaces=False),
            f"{MARKED}{token}{PLAIN}" if color else token,
        ]
        run = []
        if token_id == tokenizer.eos_token_id:
            pieces.append(f"\n{BORDER}\n")
            lengths.append(length)
            length = 0
    pieces.append(tokenizer.decode(run, clean_up_tokenization_spaces=False))
    lengths += [length] if length else []
    documents = (
        f"{len(lengths)} documents: {' + '.join(map(str, lengths))}" if len(lengths) > 1 else "1 document"
    )
    return f"{len(ids):,} tokens, {documents}\n{shorten(''.join(pieces))}"


def shorten(text: str) -> str:
    """Cut the middle out of a long text."""
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"


def _describe(index: ShardIndex) -> str:
    meta = index.meta
    shards = f"{len(index.shards):,} shard{'s' * (len(index.shards) != 1)}"
    if meta is None:
        samples = f"{index.samples:,} sample{'s' * (index.samples != 1)}"
        return f"{index.folder}: {samples} in {shards}, made by another tool"
    encoded = meta.tokens + meta.dropped_tokens
    return (
        f"{index.folder}: {meta.samples:,} samples of {meta.max_seq_len:,} tokens in {shards}\n"
        f"{meta.documents:,} documents, {meta.tokens:,} tokens, "
        f"{meta.bytes / max(encoded, 1):.2f} bytes/token, "
        f"{encoded / max(meta.documents, 1):,.0f} tokens/document\n"
        f"tokenizer {meta.tokenizer} ({meta.vocab_size:,} ids, fingerprint {meta.fingerprint[:12]})"
    )


def _borders_in_words(index: ShardIndex, tokenizer: Any) -> str:
    """Describe the special tokens around each document, or the tokenizer's default if that is unknown."""
    own, meta = spelled(own_borders(tokenizer), tokenizer), index.meta
    if meta is None:
        return f"the tokenizer {adds_in_words(own)}; this also holds for a `text` column"
    before, after = meta.options.get("borders") or (
        [tokenizer.bos_token] * bool(meta.options.get("add_bos")),
        [] if meta.eos_token_id is None else [tokenizer.convert_ids_to_tokens(meta.eos_token_id)],
    )
    as_text = "; special tokens spelled out in the text are plain text" * ("special_tokens" in meta.options)
    return documents_in_words(Borders(tuple(before), tuple(after)), own) + as_text


def _ids(
    sample: Mapping[str, Any], tokenizer: Any, token_encoding_type: str, as_text: bool, place: str
) -> list[int]:
    found = read_sample(sample, token_encoding_type, place)
    if isinstance(found, str):
        return list(tokenizer(found, **({"split_special_tokens": True} if as_text else {}))["input_ids"])
    check_ids(found, count_ids(tokenizer), "tokenizer", place)
    return list(found.tolist())
