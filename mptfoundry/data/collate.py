"""Collate samples into a batch.

A sample of text is `{"input_ids": (tokens,) int64 array, "sample_id": int}` with at most `seq` tokens; a row
of examples has more fields (see `RowCollator`). A batch has

    input_ids       (batch, seq) int64
    labels          (batch, seq) int64, aligned with input_ids, -100 for padding and tokens not in the loss
    sample_id       (batch,) int64
    attention_mask  (batch, seq) bool, if there is padding, which is always at the end
    sequence_id     (batch, seq) int64, if documents must not attend to each other
    max_documents   int: the most documents in a row; absent for text without attention_mask and sequence_id
    row_tokens      list: number of tokens in each row; absent for text without padding
    row_trained     list: number of labels in each row's loss, after the shift by one; present with row_tokens

The two lists hold Python's ints, because Composer counts a microbatch once it is on the device, where
counting in tensors would wait for the device. Rows of text without padding are counted by their shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mptfoundry.data.shards.token_ids import NOT_IN_LOSS


@dataclass(frozen=True)
class TextCollator:
    """Stack samples, pad short ones at the end, and number the documents in each sample if asked.

    Attributes:
        max_seq_len: Length of every row, in tokens.
        pad_token_id: Pads short rows. The mask depends on position, so any id works.
        eos_token_id: If set, documents end with this id, and the batch has `sequence_id`.
        bos_token_id: If set, documents start with this id, and the batch has `sequence_id`.
    """

    max_seq_len: int
    pad_token_id: int = 0
    eos_token_id: int | None = None
    bos_token_id: int | None = None

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate samples into a batch (see the module docstring)."""
        input_ids = np.full((len(samples), self.max_seq_len), self.pad_token_id, np.int64)
        is_text = np.zeros((len(samples), self.max_seq_len), bool)
        for row, sample in enumerate(samples):
            length = len(sample["input_ids"])
            input_ids[row, :length] = sample["input_ids"]
            is_text[row, :length] = True
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(np.where(is_text, input_ids, NOT_IN_LOSS)),
            "sample_id": torch.tensor([sample["sample_id"] for sample in samples], dtype=torch.int64),
        }
        if not is_text.all():
            batch |= {"attention_mask": torch.from_numpy(is_text), "max_documents": 1}
            batch |= {"row_tokens": is_text.sum(1).tolist(), "row_trained": is_text[:, 1:].sum(1).tolist()}
        if self.eos_token_id is not None or self.bos_token_id is not None:
            batch |= self._documents(batch["input_ids"], torch.from_numpy(is_text))
        return batch

    def _documents(self, input_ids: Tensor, is_text: Tensor) -> dict[str, Any]:
        """The documents of each row by number, and the most of them in a row."""
        sequence_id = sequence_ids(input_ids, self.eos_token_id, self.bos_token_id)
        begins = (sequence_id[:, 1:] != sequence_id[:, :-1]) & is_text[:, 1:]
        return {"sequence_id": sequence_id, "max_documents": 1 + int(begins.sum(1).max())}


@dataclass(frozen=True)
class RowCollator:
    """Stack rows of concatenated examples and pad them at the end.

    A row is `{"input_ids": (tokens,) int64, "trained": (tokens,) bool, "lengths": (examples,) int64,
    "sample_id": int}`. Examples in a row don't attend to each other: `sequence_id` separates them, and the
    first token of an example is not predicted from the previous example. A rank that has run out of rows gets
    empty ones; each becomes a single token that is not in the loss and is not counted.

    Attributes:
        max_seq_len: Maximum tokens in a row, and the length of every row unless padding is trimmed.
        pad_token_id: Pads short rows.
        trims_padding: Trim the batch to its longest row, rounded up to a multiple of 8 tokens.
    """

    max_seq_len: int
    pad_token_id: int = 0
    trims_padding: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate rows into a batch (see the module docstring)."""
        tokens = [len(row["input_ids"]) for row in rows]
        width = (
            min(self.max_seq_len, -(-max(1, *tokens) // 8) * 8) if self.trims_padding else self.max_seq_len
        )
        input_ids = np.full((len(rows), width), self.pad_token_id, np.int64)
        labels = np.full((len(rows), width), NOT_IN_LOSS, np.int64)
        sequence_id = np.zeros((len(rows), width), np.int64)
        for place, row in enumerate(rows):
            ids, lengths = row["input_ids"], row["lengths"]
            input_ids[place, : len(ids)] = ids
            labels[place, : len(ids)] = np.where(row["trained"], ids, NOT_IN_LOSS)
            begins = lengths.cumsum()[:-1]
            labels[place, 0] = labels[place, begins] = NOT_IN_LOSS
            sequence_id[place, begins] = 1
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "sample_id": torch.tensor([row["sample_id"] for row in rows], dtype=torch.int64),
            "max_documents": max(1, *(len(row["lengths"]) for row in rows)),
            "row_tokens": tokens,
            "row_trained": np.count_nonzero(labels != NOT_IN_LOSS, axis=1).tolist(),
        }
        if min(tokens) < width:
            real = np.maximum(tokens, 1)[:, None]
            batch["attention_mask"] = torch.from_numpy(np.arange(width) < real)
        if batch["max_documents"] > 1:
            batch["sequence_id"] = torch.from_numpy(sequence_id.cumsum(1))
        return batch


def count_rows(batch: Mapping[str, Any]) -> int:
    """Count the rows in a batch of finetuning rows, excluding empty ones."""
    return sum(tokens > 0 for tokens in batch["row_tokens"])


def sequence_ids(
    input_ids: torch.Tensor, eos_token_id: int | None = None, bos_token_id: int | None = None
) -> torch.Tensor:
    """Number the documents in each row 0, 1, 2, ...

    Pass exactly one of `eos_token_id` and `bos_token_id`.

    Args:
        input_ids: (batch, seq) int64.
        eos_token_id: The last token of each document.
        bos_token_id: The first token of each document.

    Returns:
        (batch, seq) int64.
    """
    border = eos_token_id if bos_token_id is None else bos_token_id
    assert border is not None
    is_border = torch.eq(input_ids, border).long()
    borders = is_border.cumsum(dim=1)
    return borders if bos_token_id is not None else borders - is_border


def count_tokens(batch: Mapping[str, Any]) -> dict[str, int]:
    """Count tokens without padding (`total`) and what the mean loss divides by (`loss_generating`)."""
    if "row_tokens" in batch:
        return {"total": sum(batch["row_tokens"]), "loss_generating": sum(batch["row_trained"])}
    rows, seq = batch["input_ids"].shape
    return {"total": rows * seq, "loss_generating": rows * (seq - 1)}


def count_samples(batch: Mapping[str, Any]) -> int:
    """Count the rows in a batch."""
    return int(batch["input_ids"].shape[0])


def filler_id(tokenizer: Any) -> int:
    """Return the id to pad with: padding, else EOS, else 0. The mask depends on position, not on the id."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token_id for token_id in ids if token_id is not None)
