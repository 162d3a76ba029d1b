"""The items of a dataset of the user's own, checked as they are read.

An *item* is a dict with the ids of one row, and optionally `labels`, `attention_mask` and `sequence_id`;
`read_item` says what each may be.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mptfoundry.data.loading import LoaderContext
from mptfoundry.data.shards.token_ids import NOT_IN_LOSS
from mptfoundry.errors import DataError, MPTFoundryError, RunStopped, first_line
from mptfoundry.ranks import rank

# What is read of an item.
KEYS = ("input_ids", "labels", "attention_mask", "sequence_id")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """One checked item, without padding.

    Attributes:
        input_ids: (tokens,) int64.
        labels: (tokens,) int64, aligned with `input_ids`; -100 if not in the loss.
        lengths: (documents,) int64, the tokens of each document; documents do not attend to each other.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray


class Items:
    """The user's dataset, whose items are checked when they are read.

    Args:
        made: The dataset that the user's class or function returned.
        count: How many items it has.
        made_by: That class or function, for errors.
        context: What the loader needs from the run.

    Attributes:
        is_quiet: Whether to skip the warning about ignored keys: an item was read before, or rank is not 0.
    """

    def __init__(self, made: Any, count: int, made_by: str, context: LoaderContext) -> None:
        self.made = made
        self.count = count
        self.made_by = made_by
        self.where = context.where
        self.max_seq_len = context.max_seq_len
        self.vocab_size = context.model.vocab_size
        self.is_quiet = rank() != 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Item:
        try:
            values = self.made[number]
        except (MPTFoundryError, RunStopped):
            raise
        except Exception as error:
            text = f"fails: {type(error).__name__}: {first_line(error)}. MPTFOUNDRY_DEBUG=1 shows where."
            raise DataError(f"{self.place(number)} {text}") from error
        if not isinstance(values, Mapping) or "input_ids" not in values:
            keys = (
                f"the keys {', '.join(map(str, values))}"
                if isinstance(values, Mapping)
                else type(values).__name__
            )
            raise DataError(
                f"{self.place(number)} has no input_ids, but {keys}. Return a dict with input_ids, and where "
                "needed labels, attention_mask and sequence_id."
            )
        self._warn_of_others(values, number)
        try:
            return read_item(values, self.max_seq_len, self.vocab_size)
        except ValueError as error:
            raise DataError(f"{self.place(number)} {error}") from error

    def place(self, number: int) -> str:
        """What an item is called in errors."""
        return f"{self.where}: item {number} of {self.made_by}"

    def bytes_of(self, number: int) -> bytes:
        """All of an item as bytes, to compare it."""
        return b"".join(each.tobytes() for each in vars(self[number]).values())

    def _warn_of_others(self, values: Mapping[str, Any], number: int) -> None:
        """Warn of the ignored keys of the first item that is read; later items are not inspected."""
        others = [str(key) for key in values if key not in KEYS]
        if others and not self.is_quiet:
            log.warning("%s: these keys are not looked at: %s.", self.place(number), ", ".join(others))
        self.is_quiet = True


def read_item(values: Mapping[str, Any], max_seq_len: int, vocab_size: int) -> Item:
    """Check an item and bring it into one form.

    Args:
        values: `input_ids`, 1 to `max_seq_len` ids; and optionally, of the same length, `labels`, by default
            the ids, -100 where a token is not in the loss; `attention_mask`, 0 for padding, which is cut off
            the end; `sequence_id`, which rises from one document to the next. Each is an array, a tensor or a
            list.
        max_seq_len: The most tokens in a row.
        vocab_size: Ids are smaller.

    Raises:
        ValueError: It is something else; the message is a predicate, such as `has 40 tokens; ...`.
    """
    ids = _integers(values, "input_ids")
    rows = {name: _integers(values, name) for name in KEYS[1:] if values.get(name) is not None}
    for name, row in rows.items():
        if len(row) != len(ids):
            raise ValueError(f"has {len(row)} {name} for {len(ids)} input_ids. Give one for each token.")
    if "attention_mask" in rows:
        length = _without_padding(rows["attention_mask"])
        ids, rows = ids[:length], {name: row[:length] for name, row in rows.items()}
    if not 1 <= len(ids) <= max_seq_len:
        raise ValueError(f"has {len(ids)} tokens; max_seq_len is {max_seq_len}. Return 1 to {max_seq_len}.")
    labels = rows.get("labels", ids)
    for name, row in {"input_ids": ids, "labels": labels[labels != NOT_IN_LOSS]}.items():
        if len(row) and not 0 <= row.min() <= row.max() < vocab_size:
            bad = row.min() if row.min() < 0 else row.max()
            raise ValueError(
                f"has the id {bad} in {name}, but the model's are 0 to {vocab_size - 1}. Use the run's "
                "tokenizer, which an argument called tokenizer gets."
            )
    lengths = _lengths(rows.get("sequence_id", np.zeros(len(ids), np.int64)))
    in_loss = labels != NOT_IN_LOSS
    in_loss[np.concatenate([[0], lengths.cumsum()[:-1]])] = False
    if not in_loss.any():
        raise ValueError(
            "has no token in the loss: that needs a label other than -100 after the first token of a "
            "document. Leave such items out."
        )
    return Item(ids, np.where(in_loss, labels, NOT_IN_LOSS), lengths)


def _integers(values: Mapping[str, Any], name: str) -> np.ndarray:
    """One row of integers or bools as int64; a ValueError for anything else."""
    try:
        row = np.asarray(values[name])
    except (TypeError, ValueError) as error:  # a tensor on a GPU, or lists of several lengths
        raise ValueError(
            f"has {name} that can't be read: {first_line(error)}. Return one row of integers."
        ) from error
    if row.ndim != 1 or (row.size and row.dtype.kind not in "iub"):
        text = f"{row.dtype} of shape {row.shape}"
        raise ValueError(f"has {name} of type {text}. Return one row of integers.")
    return row.astype(np.int64)


def _without_padding(mask: np.ndarray) -> int:
    """The tokens before the padding."""
    length = int((mask != 0).sum())
    if not mask[:length].all():
        raise ValueError("has padding before its end in attention_mask. Put it at the end, or leave it out.")
    return length


def _lengths(sequence_id: np.ndarray) -> np.ndarray:
    steps = np.diff(sequence_id)
    if (steps < 0).any():
        raise ValueError(
            "has a sequence_id that falls. Number the documents of a row in their order, such as 0, 0, 1."
        )
    bounds = np.concatenate([[0], np.flatnonzero(steps) + 1, [len(sequence_id)]])
    return np.diff(bounds)
