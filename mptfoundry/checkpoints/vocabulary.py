"""Embeddings of more or fewer rows than are stored.

Rows are added and taken away at the end, where no tokenizer has ids yet, or none any more. A new row is the
mean of the stored ones: its logit is then the mean of their logits, so that a new token is neither likely nor
ruled out before it is trained (https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mptfoundry.checkpoints.weights import EMBEDDING, PROJECTION, Rows, TensorOutline, Weights

if TYPE_CHECKING:
    from mptfoundry.checkpoints.reading import ModelSource

_ROWS_ARE_TOKENS = (EMBEDDING, PROJECTION)


def with_rows(source: ModelSource, vocab_size: int) -> ModelSource:
    """The model with `vocab_size` rows in its embedding, and in its output matrix if that is another."""
    if vocab_size == source.config.vocab_size:
        return source
    config = replace(source.config, vocab_size=vocab_size)
    return replace(source, config=config, weights=_OtherRows(source.weights, vocab_size))


class _OtherRows:
    """Weights whose token matrices are padded or cut."""

    def __init__(self, stored: Weights, rows: int) -> None:
        self._stored = stored
        self._rows = rows
        self._means: dict[str, torch.Tensor] = {}

    @property
    def outlines(self) -> Mapping[str, TensorOutline]:
        """All tensors, by name."""
        return {
            name: replace(outline, shape=(self._rows, *outline.shape[1:]))
            if name in _ROWS_ARE_TOKENS
            else outline
            for name, outline in self._stored.outlines.items()
        }

    def read(self, name: str, dtype: torch.dtype | None = None, rows: Rows = None) -> torch.Tensor:
        """One tensor, or some of its rows."""
        if name not in _ROWS_ARE_TOKENS:
            return self._stored.read(name, dtype, rows)
        first, last = rows or (0, self._rows)
        stored = self._stored.outlines[name].shape[0]
        old = self._stored.read(name, dtype, (min(first, stored), min(last, stored)))
        if last <= stored:
            return old
        if name not in self._means:
            self._means[name] = self._stored.read(name).double().mean(0)
        new = self._means[name].to(old.dtype).expand(last - max(first, stored), -1)
        return torch.cat([old, new])
