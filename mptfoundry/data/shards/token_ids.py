"""Read token ids or text from samples and records: integer arrays, raw bytes, or text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from mptfoundry.errors import DataError

# With fewer ids, every second one may be 0 by chance, for example if it is EOS.
_FEWEST_IDS_JUDGED = 8

# The label of a token that is not in the loss, as in torch and transformers.
NOT_IN_LOSS = -100


def read_sample(sample: Mapping[str, Any], token_encoding_type: str, place: str) -> np.ndarray | str:
    """Return the ids, (tokens,) int64, of a sample's column `tokens`, or the text of its column `text`.

    `token_encoding_type` is the type of ids stored as bytes; `place` is the sample's location, for errors.

    Raises:
        DataError: The sample has neither column, or its value has the wrong type.
    """
    if "tokens" in sample:
        return stored_ids(sample["tokens"], token_encoding_type, place)
    if "text" not in sample:
        columns = ", ".join(name[:40] for name in sorted(sample)[:9])
        raise DataError(f"{place} has the columns {columns}. Give shards with a column `tokens` or `text`.")
    return _stored_text(sample["text"], place)


def _stored_text(text: Any, place: str) -> str:
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: its text is not UTF-8 ({error.reason} at byte {error.start}).") from error
    if not isinstance(text, str):
        raise DataError(f"{place} has a text of type {type(text).__name__}. Give shards with text as str.")
    return text


def stored_ids(tokens: Any, token_encoding_type: str, place: str) -> np.ndarray:
    """Return a sample's ids, (tokens,) int64, from an array or from bytes of `token_encoding_type`.

    Raises:
        DataError: The ids are not a row of integers, or the bytes are of another type.
    """
    if isinstance(tokens, bytes):
        try:
            ids = unpack_ids(tokens, token_encoding_type)
        except ValueError as error:
            raise DataError(f"{place} {error}.") from error
    else:
        ids = np.asarray(tokens) if isinstance(tokens, list) else tokens
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
        _refuse_ids(ids, place)
    return ids.astype(np.int64)


def _refuse_ids(ids: Any, place: str) -> NoReturn:
    kind = f"{ids.dtype} and shape {ids.shape}" if isinstance(ids, np.ndarray) else type(ids).__name__
    raise DataError(f"{place} has tokens of type {kind}. Each sample must be one non-empty row of integers.")


def unpack_ids(data: bytes, token_encoding_type: str) -> np.ndarray:
    """Convert bytes to ids: (tokens,) of `token_encoding_type`.

    Raises:
        ValueError: The ids were written as another type. The message is a predicate without a period, such as
            `has 9 bytes, ...`, for the caller to complete.
    """
    dtype = np.dtype(token_encoding_type)
    if len(data) % dtype.itemsize:
        raise ValueError(
            f"has {len(data)} bytes, which are not a whole number of {dtype.name} ids. Set "
            "token_encoding_type to the type they were written with"
        )
    ids = np.frombuffer(data, dtype)
    if wider := _wider_type(ids):
        raise ValueError(
            f"holds {wider} ids, read as {dtype.name}: there are zeros between them. Set "
            f"token_encoding_type: {wider}, or the type they were written with"
        )
    return ids


def check_ids(ids: np.ndarray, count: int, owner: str, place: str) -> None:
    """Raise DataError if an id is not in the range 0 to `count` - 1 of `owner`."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= count:
        raise DataError(
            f"{place} has the id {low if low < 0 else high}, but the {owner}'s are 0 to {count - 1}. Use the "
            "tokenizer (or the token_encoding_type) it was made with."
        )


def _wider_type(ids: np.ndarray) -> str | None:
    """Detect ids of a wider type read as a narrower one: the upper parts of every id are zero."""
    for ratio in (8, 4, 2):
        bits = 8 * ids.itemsize * ratio
        if bits <= 64 and ids.size >= _FEWEST_IDS_JUDGED and ids.size % ratio == 0:
            parts = ids.reshape(-1, ratio)
            if parts[:, : ratio // 2].any() and not parts[:, ratio // 2 :].any():
                return f"int{bits}"
    return None
