"""Networks with task heads: sequence classification, token classification, question answering by a span.

The trunk is the language model's. Weights, logits and losses match transformers' classes
(`MptForSequenceClassification` and so on), with one difference: here padding can't be an answer's first or
last token, so the loss doesn't depend on the length that a batch is padded to.

Letters of the shapes: batch = rows, seq = tokens of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .config import MPTConfig
from .head_config import HeadConfig, SequenceClassifierConfig, SpanFinderConfig, TokenClassifierConfig
from .init import materialise
from .loss import mean_cross_entropy, wide
from .network import MPT, Transformer
from .position import number_documents


class HeadOutput(NamedTuple):
    """The outputs of a forward pass; a tuple for FSDP, like MPTOutput.

    Attributes:
        loss: The mean loss, a float32 scalar; None without labels.
        terms: The number of rows, tokens or spans in that mean, a scalar; None without labels.
        logits: (batch, outputs) for a sequence classifier, otherwise (batch, seq, outputs).
    """

    loss: torch.Tensor | None
    terms: torch.Tensor | None
    logits: torch.Tensor


class _HeadNetwork(nn.Module):
    """A trunk, `transformer`, and a linear layer with the head's name.

    Args:
        config: The architecture.
        device, seed, empty: As for MPT.
    """

    def __init__(
        self,
        config: HeadConfig,
        *,
        device: torch.device | str | None = None,
        seed: int | None = None,
        empty: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config, "meta")
        head = nn.Linear(config.d_model, config.outputs, bias=config.has_bias, device="meta")
        self.add_module(config.head, head)
        materialise(self, config, device, seed, empty)

    def _trunk(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, max_documents: int | None
    ) -> torch.Tensor:
        """Map (batch, seq) ids to (batch, seq, d_model)."""
        mask = None if attention_mask is None else attention_mask.bool()
        return self.transformer(input_ids, number_documents(mask, None), None, None, max_documents)

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map (..., d_model) to (..., outputs)."""
        return self.get_submodule(self.config.head)(hidden)


class SequenceClassifier(_HeadNetwork):
    """Logits of whole texts, from each row's last token that is not padding; the head is `score`.

    Attributes:
        pad_token_id: The id of padding; as in transformers, it decides and not the mask. If it is None, the
            row's last token counts, and a batch can have only one row.
    """

    config: SequenceClassifierConfig
    pad_token_id: int | None = None

    def forward(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        max_documents: int | None = None,
    ) -> HeadOutput:
        """Classify texts, or predict numbers for them.

        Args:
            input_ids: (batch, seq) int64.
            attention_mask: (batch, seq) bool or integers, 0 where padded, left or right.
            labels: (batch,) label indices; (batch,) or (batch, num_labels) regression targets; or
                (batch, num_labels) of 0.0 and 1.0 for multi-label classification. If the config has no
                `problem_type`, integers are label indices, and floats with several labels are multi-label.
            max_documents: 1 if padding is at the end of rows; it changes no result (see MPT).

        Returns:
            Logits (batch, num_labels), and with labels the mean loss over rows.

        Raises:
            ValueError: There are several rows, but `pad_token_id` is None.
        """
        batch, seq = input_ids.shape
        if self.pad_token_id is None and batch != 1:
            raise ValueError("input_ids: several rows need a pad_token_id, to find where each row ends.")
        hidden = self._trunk(input_ids, attention_mask, max_documents)
        if self.pad_token_id is None:
            last = torch.full((1,), seq - 1, device=input_ids.device)
        else:
            positions = torch.arange(seq, device=input_ids.device)
            last = (positions * (input_ids != self.pad_token_id)).argmax(-1)
        logits = self._head(hidden[torch.arange(batch, device=last.device), last])  # (batch, num_labels)
        if labels is None:
            return HeadOutput(None, None, logits)
        return HeadOutput(
            self._loss(wide(logits), labels), torch.full((), batch, device=logits.device), logits
        )

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        problem = self.config.problem_type or self.config.problem
        if self.config.problem_type is None and self.config.num_labels > 1 and labels.is_floating_point():
            problem = "multi_label_classification"
        if problem == "regression":
            return F.mse_loss(logits, labels.view_as(logits).to(logits.dtype))
        if problem == "single_label_classification":
            return F.cross_entropy(logits, labels)
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


class TokenClassifier(_HeadNetwork):
    """Logits of each token; the head is `classifier`, after dropout."""

    config: TokenClassifierConfig

    def forward(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        max_documents: int | None = None,
    ) -> HeadOutput:
        """Classify tokens.

        Args:
            input_ids: (batch, seq) int64.
            attention_mask: (batch, seq) bool or integers, 0 where padded, left or right.
            labels: (batch, seq) int64, not shifted; -100 for tokens that are not in the loss.
            max_documents: 1 if padding is at the end of rows.

        Returns:
            Logits (batch, seq, num_labels), and with labels the mean loss over the tokens in the loss.
        """
        hidden = F.dropout(
            self._trunk(input_ids, attention_mask, max_documents),
            self.config.classifier_dropout,
            self.training,
        )
        logits = self._head(hidden)
        if labels is None:
            return HeadOutput(None, None, logits)
        loss, count = mean_cross_entropy(logits.flatten(0, 1), labels.flatten())
        return HeadOutput(loss, count, logits)


class SpanFinder(_HeadNetwork):
    """Each token's logits as the first and the last of an answer; the head is `qa_outputs`."""

    config: SpanFinderConfig

    def forward(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        max_documents: int | None = None,
    ) -> HeadOutput:
        """Find answers.

        Args:
            input_ids: (batch, seq) int64, questions with their texts.
            attention_mask: (batch, seq) bool or integers, 0 where padded, left or right.
            start_positions: (batch,) int64, each answer's first token; a position outside the row is not in
                the loss.
            end_positions: (batch,) int64, its last token, likewise.
            max_documents: 1 if padding is at the end of rows.

        Returns:
            Logits (batch, seq, 2) for first and last, the dtype's lowest number for padding; and with
            positions the mean of both losses, each over the rows in the loss.
        """
        logits = self._head(self._trunk(input_ids, attention_mask, max_documents))  # (batch, seq, 2)
        if attention_mask is not None:
            is_padding = ~attention_mask.bool()[..., None]
            logits = logits.masked_fill(is_padding, torch.finfo(logits.dtype).min)
        if start_positions is None or end_positions is None:
            return HeadOutput(None, None, logits)
        outside = input_ids.shape[1]
        first, count = mean_cross_entropy(logits[..., 0], start_positions.clamp(0, outside), outside)
        last, _ = mean_cross_entropy(logits[..., 1], end_positions.clamp(0, outside), outside)
        return HeadOutput((first + last) / 2, count, logits)


_NETWORKS: dict[type[MPTConfig], type[nn.Module]] = {
    SequenceClassifierConfig: SequenceClassifier,
    TokenClassifierConfig: TokenClassifier,
    SpanFinderConfig: SpanFinder,
}


def make_network(
    config: MPTConfig,
    *,
    device: torch.device | str | None = None,
    seed: int | None = None,
    empty: bool = False,
) -> nn.Module:
    """Build the network of an architecture: a language model, or a network with the config's head.

    The arguments are those of `MPT`.
    """
    kind = next((network for known, network in _NETWORKS.items() if isinstance(config, known)), MPT)
    return kind(config, device=device, seed=seed, empty=empty)
