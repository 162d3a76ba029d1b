"""Exact loss, perplexity, accuracy and bits per byte over a whole data set.

A mean of batch means is wrong if batches differ in tokens, and a sampler that pads its ranks with repeated
samples counts those twice. Here every sample yields one row of sums. The rows of all ranks are gathered,
repeated samples dropped, and the sums added in float64 in sample order and divided once. So the result
doesn't depend on the batch size or on the number of ranks.

A row is (sample_id, loss, tokens, byte_loss, bytes, correct): the sample's index in the data set, the sum of
its tokens' losses in nats, the number of predicted tokens, the loss of the tokens that represent bytes, the
number of those bytes, and the number of tokens that were the most likely prediction. A special token, such as
the end of a document, represents no bytes. It counts in everything but bits per byte, which is therefore
comparable across tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

# A sample without an id counts every time it occurs.
UNNUMBERED = -1


def token_loss_rows(
    token_loss: Tensor,
    labels: Tensor,
    sample_id: Tensor | None = None,
    token_bytes: Tensor | None = None,
    token_correct: Tensor | None = None,
) -> Tensor:
    """One row of sums for each sample of a batch.

    Args:
        token_loss: (batch, seq) float32; entry t is the loss of predicting `labels[t + 1]` in nats, 0 where
            nothing is predicted.
        labels: (batch, seq) int64, aligned with the inputs; -100 where nothing is predicted.
        sample_id: (batch,) int64, the samples' indices in the data set; None: every sample counts.
        token_bytes: (vocab_size,) int64, the number of bytes that each token represents; None: 0 bytes.
        token_correct: (batch, seq) bool, aligned with `token_loss`; None: `correct` is NaN.

    Returns:
        (batch, 6) float64: sample_id, loss, tokens, byte_loss, bytes, correct.
    """
    targets = labels[:, 1:]
    predicted = targets != -100
    losses = token_loss[:, :-1].double() * predicted
    target_bytes = targets * 0 if token_bytes is None else token_bytes[targets.clamp(min=0)] * predicted
    if sample_id is None:
        sample_id = torch.full((len(labels),), UNNUMBERED, device=labels.device)
    correct = torch.full((len(labels),), math.nan, device=labels.device)
    if token_correct is not None:
        correct = (token_correct[:, :-1] & predicted).sum(-1)
    columns = (
        sample_id.to(labels.device),
        losses.sum(-1),
        predicted.sum(-1),
        (losses * (target_bytes > 0)).sum(-1),
        target_bytes.sum(-1),
        correct,
    )
    return torch.stack([column.double() for column in columns], dim=-1)


def add_up(rows: Tensor) -> dict[str, float]:
    """The results over all rows, each sample counted once.

    Args:
        rows: (samples, 6) float64, in any order, possibly with repeated samples.

    Returns:
        LanguageCrossEntropy (nats per token), LanguagePerplexity (its exponential), TokenAccuracy
        (fraction of correct tokens), bits_per_byte, tokens, bytes and samples. A mean over nothing is NaN.
    """
    table = rows.detach().cpu().numpy()
    table = table[np.argsort(table[:, 0], kind="stable")]
    repeated = np.zeros(len(table), dtype=bool)
    repeated[1:] = (table[1:, 0] == table[:-1, 0]) & (table[1:, 0] != UNNUMBERED)
    table = table[~repeated]
    loss, tokens, byte_loss, text_bytes, correct = (math.fsum(column) for column in table.T[1:])
    cross_entropy = loss / tokens if tokens else math.nan
    return {
        "LanguageCrossEntropy": cross_entropy,
        "LanguagePerplexity": _exp(cross_entropy),
        "TokenAccuracy": correct / tokens if tokens else math.nan,
        "bits_per_byte": byte_loss / math.log(2) / text_bytes if text_bytes else math.nan,
        "tokens": tokens,
        "bytes": text_bytes,
        "samples": float(len(table)),
    }


class TokenLoss(Metric):
    """Gathers the rows; `compute` returns one of `add_up`'s results.

    Args:
        token_bytes: (vocab_size,) the number of bytes that each token represents; needed for bits per byte.
    """

    full_state_update = False
    is_differentiable = False
    result: str
    rows: list[Tensor]
    token_bytes: Tensor | None

    def __init__(self, token_bytes: np.ndarray | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        table = None if token_bytes is None else torch.from_numpy(np.asarray(token_bytes, dtype=np.int64))
        self.register_buffer("token_bytes", table, persistent=False)

    def update(self, batch: Mapping[str, Tensor], outputs: Any) -> None:
        """Add a batch and the network's `outputs.token_loss` and `outputs.token_correct` (batch, seq)."""
        ids, correct = batch.get("sample_id"), outputs.token_correct
        self.rows.append(token_loss_rows(outputs.token_loss, batch["labels"], ids, self.token_bytes, correct))

    def compute(self) -> Tensor:
        """The result over all ranks, float64."""
        rows = self.rows
        table = rows if isinstance(rows, Tensor) else torch.cat(rows or [_no_rows(self.device)])
        return torch.tensor(add_up(table)[self.result], dtype=torch.float64)

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # A rank without samples needs an empty table, or the other ranks wait for its shape.
        if isinstance(self.rows, list) and not self.rows:
            self.rows = [_no_rows(self.device)]
        super()._sync_dist(*args, **kwargs)


class LanguageCrossEntropy(TokenLoss):
    """Mean loss per token, in nats."""

    result = "LanguageCrossEntropy"


class LanguagePerplexity(TokenLoss):
    """The exponential of the mean loss per token."""

    result = "LanguagePerplexity"


class TokenAccuracy(TokenLoss):
    """Fraction of tokens that were the most likely prediction."""

    result = "TokenAccuracy"


class BitsPerByte(TokenLoss):
    """Loss in bits per byte of text."""

    result = "bits_per_byte"


class TokenCount(TokenLoss):
    """How many tokens were predicted."""

    result = "tokens"


def token_loss_metrics(token_bytes: np.ndarray | None = None) -> dict[str, Metric]:
    """The metrics of a labelled evaluation loader, by their names in logs.

    Args:
        token_bytes: (vocab_size,) the number of bytes that each token represents; None: no bits_per_byte.
    """
    metrics: dict[str, Metric] = {
        "LanguageCrossEntropy": LanguageCrossEntropy(),
        "LanguagePerplexity": LanguagePerplexity(),
        "TokenAccuracy": TokenAccuracy(),
        "tokens": TokenCount(),
    }
    if token_bytes is not None:
        metrics["bits_per_byte"] = BitsPerByte(token_bytes)
    return metrics


def _no_rows(device: torch.device) -> Tensor:
    return torch.zeros(0, 6, dtype=torch.float64, device=device)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
