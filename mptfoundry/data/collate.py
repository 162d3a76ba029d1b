"""From samples to a batch.

A sample is `{"input_ids": (tokens,) int64 array, "sample_id": int}` of at most `seq` tokens. A batch has
`input_ids` (batch, seq) int64; `labels` (batch, seq) int64, aligned with input_ids, -100 where padded;
`sample_id` (batch,) int64; `attention_mask` (batch, seq) bool if something is padded, always at the end;
`sequence_id` (batch, seq) int64 if documents must not see one another; with either of these the number
`max_documents`: no row holds more. Rows of examples also bring `row_tokens` and `row_trained`, a list each:
tokens of each row, and how many labels of it are in the loss once shifted by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mptfoundry.data.shards.token_ids import NOT_IN_LOSS


@dataclass(frozen=True)
class TextCollator:
    """Stack samples; pad short ones at the end; number the documents in a sample if asked.

    Attributes:
        max_seq_len: Length of every row, in tokens.
        pad_token_id: What fills short rows. It is masked by place, so any id will do.
        eos_token_id: If given, a document ends with this id, and `sequence_id` is added to the batch.
        bos_token_id: If given, a document starts with this id, and `sequence_id` is added to the batch.
    """

    max_seq_len: int
    pad_token_id: int = 0
    eos_token_id: int | None = None
    bos_token_id: int | None = None

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch (see the head of this file) of samples."""
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
            batch["attention_mask"] = torch.from_numpy(is_text)
            batch["max_documents"] = 1
        if self.eos_token_id is not None or self.bos_token_id is not None:
            sequence_id = sequence_ids(batch["input_ids"], self.eos_token_id, self.bos_token_id)
            begins = (sequence_id[:, 1:] != sequence_id[:, :-1]) & torch.from_numpy(is_text[:, 1:])
            batch |= {"sequence_id": sequence_id, "max_documents": 1 + int(begins.sum(1).max())}
        return batch


@dataclass(frozen=True)
class RowCollator:
    """Lay the examples of each row end to end; pad rows at the end.

    A row is `{"input_ids": (tokens,) int64, "trained": (tokens,) bool, "lengths": (examples,) int64,
    "sample_id": int}`, its examples end to end. Examples of a row do not see one another: `sequence_id`
    distinguishes them, and no example's first token is predicted from the one before. A row without examples,
    which stands where a rank has none left, becomes a token that is not in the loss, and counts as none.

    Attributes:
        max_seq_len: The most tokens of a row, and the length of all rows unless padding is trimmed.
        pad_token_id: What fills short rows.
        trims_padding: Cut rows behind the longest of the batch, to a multiple of 8 tokens.
    """

    max_seq_len: int
    pad_token_id: int = 0
    trims_padding: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch (see the head of this file) of rows."""
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


def count_row_tokens(batch: Mapping[str, Any]) -> dict[str, int]:
    """Tokens in a batch of rows of examples, padding left out (`total`), and how many labels its mean loss
    divides by (`loss_generating`). Both are numbers of the host: no device is waited for.
    """
    return {"total": sum(batch["row_tokens"]), "loss_generating": sum(batch["row_trained"])}


def count_rows(batch: Mapping[str, Any]) -> int:
    """Rows in a batch of rows of examples, without those that stand for none."""
    return sum(tokens > 0 for tokens in batch["row_tokens"])


def sequence_ids(
    input_ids: torch.Tensor, eos_token_id: int | None = None, bos_token_id: int | None = None
) -> torch.Tensor:
    """Number the documents of each row 0, 1, 2, ...

    Args:
        input_ids: (batch, seq) int64.
        eos_token_id: Ends a document and belongs to it. Exactly one of the two is given.
        bos_token_id: Starts a document and belongs to it.

    Returns:
        (batch, seq) int64.
    """
    border = eos_token_id if bos_token_id is None else bos_token_id
    assert border is not None
    is_border = torch.eq(input_ids, border).long()
    borders = is_border.cumsum(dim=1)
    return borders if bos_token_id is not None else borders - is_border


def count_tokens(batch: Mapping[str, Any]) -> dict[str, int]:
    """Tokens in a batch, for Composer's clock (`total`) and its weights of microbatches (`loss_generating`).

    `loss_generating` is the number of labels in the loss once shifted by one, which is what the mean
    loss divides by. Without padding both follow from the shape, so that a GPU is not waited for.
    """
    rows, seq = batch["input_ids"].shape
    if "attention_mask" not in batch:
        return {"total": rows * seq, "loss_generating": rows * (seq - 1)}
    trained = int((batch["labels"][:, 1:] != NOT_IN_LOSS).sum())
    return {"total": int(batch["attention_mask"].sum()), "loss_generating": trained}


def count_samples(batch: Mapping[str, Any]) -> int:
    """Rows in a batch."""
    return int(batch["input_ids"].shape[0])


def filler_id(tokenizer: Any) -> int:
    """The id that fills short rows (padding, or else EOS, or else 0); it is masked by place, not by value."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token_id for token_id in ids if token_id is not None)
