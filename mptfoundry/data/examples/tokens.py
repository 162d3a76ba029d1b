"""Read records that are already tokenized: their ids and loss mask.

A record's columns determine its form:

    turns                                 llm-foundry's [{input_ids, labels}, ...]: `input_ids` is a prompt,
                                          `labels` its response
    input_ids, labels                     one such turn, or one sequence with a loss mask
    input_ids, labels, attention_mask     one sequence with a loss mask, as in transformers and axolotl

In a sequence with a loss mask, `labels` align with `input_ids`: the same id if it is in the loss, -100 if it
is not. Without `attention_mask`, labels are a loss mask if any label is -100, or if `labels` and `input_ids`
have the same length and mostly the same ids. Neither is true of llm-foundry's prompts and responses.

Ids are lists, arrays, or bytes of integers of `token_encoding_type`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mptfoundry.data.examples.chat import RecordError
from mptfoundry.data.records.records import a_type, shown
from mptfoundry.data.shards.token_ids import NOT_IN_LOSS, unpack_ids

# Columns that are read.
COLUMNS = {"turns", "input_ids", "labels", "attention_mask"}

# The ids of a turn's prompt and response.
Ids = tuple[list[int], list[int]]


class Masked(NamedTuple):
    """One sequence: ids (tokens,) int64, and trained (tokens,) bool."""

    ids: np.ndarray
    trained: np.ndarray


@dataclass(frozen=True)
class TokenReader:
    """Reads records that are already tokenized.

    Attributes:
        vocab_size: All ids must be smaller.
        token_encoding_type: Integer type of ids stored as bytes.
    """

    vocab_size: int
    token_encoding_type: str

    def read(self, record: Any) -> list[Ids] | Masked | None:
        """Return a record's turns as ids, or its sequence; None if the record is not tokenized.

        Raises:
            RecordError: The record is tokenized but invalid.
        """
        if not is_tokenized(record):
            return None
        if _is_turns(record.get("turns")):
            return [self._turn(turn, f"turns[{number}].") for number, turn in enumerate(record["turns"])]
        ids, labels = (self._integers(record, name, "") for name in ("input_ids", "labels"))
        if record.get("attention_mask") is None and not _is_loss_mask(ids, labels):
            return [(self._ids(ids, "input_ids"), self._ids(labels, "labels"))]
        return self._masked(record, ids, labels)

    def _turn(self, turn: Any, place: str) -> Ids:
        if not isinstance(turn, Mapping):
            raise RecordError(
                place.rstrip("."), f"is {a_type(turn)}, not an object with input_ids and labels"
            )
        prompt, response = (
            self._ids(self._integers(turn, name, place), place + name) for name in ("input_ids", "labels")
        )
        return prompt, response

    def _masked(self, record: Mapping[str, Any], ids: list[int], labels: list[int]) -> Masked:
        if len(labels) != len(ids):
            raise RecordError(
                "labels",
                f"there are {len(labels)} for {len(ids)} input_ids. With an attention_mask or a -100, labels "
                "are a loss mask with one label per id",
            )
        kept = slice(0, len(ids))
        if record.get("attention_mask") is not None:
            kept = _kept(self._integers(record, "attention_mask", ""), len(ids))
        for place, (label, token_id) in enumerate(zip(labels, ids, strict=True)):
            is_padding = not kept.start <= place < kept.stop
            if is_padding and label != NOT_IN_LOSS:
                reason = "is in the loss, though attention_mask is 0 there. Set it to -100"
                raise RecordError(f"labels[{place}]", reason)
            if label not in (NOT_IN_LOSS, token_id):
                reason = f"{shown(label)} is neither -100 nor the id at its place, {shown(token_id)}"
                raise RecordError(f"labels[{place}]", reason)
        own = self._ids(ids[kept], "input_ids", kept.start)
        if not own:
            raise RecordError("input_ids", "is empty")
        return Masked(np.array(own, np.int64), np.array(labels[kept], np.int64) != NOT_IN_LOSS)

    def _integers(self, record: Mapping[str, Any], field: str, place: str) -> list[int]:
        """Convert a list, an array or bytes to a list of integers."""
        value, name = record.get(field), place + field
        if value is None:
            raise RecordError(name, "is missing or null")
        if isinstance(value, (bytes, bytearray)):
            try:
                value = unpack_ids(bytes(value), self.token_encoding_type)
            except ValueError as error:
                raise RecordError(name, str(error)) from error
        if isinstance(value, np.ndarray):
            if value.ndim != 1 or value.dtype.kind not in "iu":
                raise RecordError(
                    name, f"has the type {value.dtype} and the shape {value.shape}. Use one row of ids"
                )
            return list(value.tolist())
        if not isinstance(value, (list, tuple)):
            raise RecordError(name, f"is {a_type(value)}, not a list of ids")
        for number, entry in enumerate(value):
            if type(entry) is not int:
                raise RecordError(f"{name}[{number}]", f"{shown(entry)} is not an integer")
        return list(value)

    def _ids(self, ids: list[int], field: str, start: int = 0) -> list[int]:
        """Check that the tokenizer has all ids, and return them."""
        for number, token_id in enumerate(ids, start):
            if not 0 <= token_id < self.vocab_size:
                raise RecordError(
                    f"{field}[{number}]",
                    f"{shown(token_id)} is not an id of the tokenizer, which has 0 to {self.vocab_size - 1}",
                )
        return ids


def is_tokenized(record: Any) -> bool:
    """Whether a record has ids, possibly along with other columns."""
    if not isinstance(record, Mapping):
        return False
    pair = (record.get(name) for name in ("input_ids", "labels"))
    return _is_turns(record.get("turns")) or all(value is not None for value in pair)


def _is_turns(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(
        isinstance(turn, Mapping) and "input_ids" in turn for turn in value
    )


def _is_loss_mask(ids: Sequence[int], labels: Sequence[int]) -> bool:
    if NOT_IN_LOSS in labels:
        return True
    if len(ids) != len(labels):
        return False
    if len(ids) > 1 and labels[:-1] == ids[1:]:
        raise RecordError(
            "labels", "are input_ids moved by one. Put each label at the place of its own token"
        )
    return 2 * sum(map(int.__eq__, ids, labels)) > len(ids)


def _kept(attention_mask: Sequence[int], length: int) -> slice:
    """Return the range of tokens that are not padding; padding may be at either end or both."""
    if len(attention_mask) != length:
        raise RecordError("attention_mask", f"has {len(attention_mask)} entries for {length} input_ids")
    for number, entry in enumerate(attention_mask):
        if entry not in (0, 1):
            raise RecordError(f"attention_mask[{number}]", f"{shown(entry)} is neither 0 nor 1")
    text = bytes(attention_mask)
    start, stop = max(text.find(1), 0), text.rfind(1) + 1
    hole = text.find(0, start, stop)
    if hole >= 0:
        raise RecordError(f"attention_mask[{hole}]", "is 0 between tokens. Only padding at the ends has 0")
    return slice(start, stop)
