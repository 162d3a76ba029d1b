"""A network with a task head as a ComposerModel: its loss and its evaluation metrics.

A batch has `input_ids` (batch, seq), `attention_mask` (batch, seq) if there is padding, and the targets:
`labels` for classifiers; for answers `start_positions` and `end_positions` (batch,), `offsets`
(batch, seq, 2), each token's character range in the text or (0, 0) outside it, `context`, a list of texts,
and `answers`, a list of lists of texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, MeanSquaredError, Metric, PearsonCorrCoef
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MultilabelAccuracy,
    MultilabelF1Score,
)
from torchmetrics.text import SQuAD

from mptfoundry.errors import ConfigError
from mptfoundry.models.causal_lm import ComposerMPT
from mptfoundry.mpt.head_config import HeadConfig, SequenceClassifierConfig, TokenClassifierConfig
from mptfoundry.mpt.heads import SequenceClassifier
from mptfoundry.mpt.loss import IGNORED

# The longest answer in evaluation, in tokens.
LONGEST_ANSWER = 30


class ComposerHead(ComposerMPT):
    """A network with a task head and the interface of Composer's Trainer; see ComposerMPT.

    Args:
        network: A network from mpt/heads.py.
        tokenizer: A sequence classifier finds the end of a row by its padding token.
        seed: For weights on the meta device.

    Raises:
        ConfigError: The network is a sequence classifier, but the tokenizer has no padding token.
    """

    inputs = ("attention_mask", "labels", "start_positions", "end_positions", "max_documents")

    def __init__(self, network: Any, *, tokenizer: Any, seed: int = 0) -> None:
        super().__init__(network, eval_metrics=head_metrics(network.config), tokenizer=tokenizer, seed=seed)
        if isinstance(network, SequenceClassifier):
            if tokenizer.pad_token_id is None:
                raise ConfigError(
                    "tokenizer: has no padding token, which tells where a text ends. Name one of its special "
                    'tokens, such as tokenizer.kwargs.pad_token="<|padding|>".'
                )
            network.pad_token_id = tokenizer.pad_token_id

    def update_metric(self, batch: Mapping[str, Any], outputs: Any, metric: Metric) -> None:
        """Add a batch and its HeadOutput to a metric of `head_metrics`."""
        config: Any = self.config
        if isinstance(metric, MeanMetric):
            metric.update(outputs.loss, outputs.terms)
        elif isinstance(metric, SQuAD):
            metric.update(*found_and_wanted(outputs.logits, batch))
        elif isinstance(config, TokenClassifierConfig):
            metric.update(outputs.logits.flatten(0, 1), batch["labels"].flatten())
        elif config.problem == "multi_label_classification":
            metric.update(outputs.logits.float().sigmoid(), batch["labels"].int())
        elif config.problem == "regression":
            metric.update(outputs.logits.float().view_as(batch["labels"]), batch["labels"])
        else:
            metric.update(outputs.logits, batch["labels"])


def head_metrics(config: HeadConfig) -> dict[str, Metric]:
    """The evaluation metrics, by their names in logs.

    They are `loss`, and for classifiers `accuracy` and macro `f1`, for regression `mse` and, with one label,
    `pearson`, for answers `exact_match` and `f1`, in percent as for SQuAD.
    """
    metrics: dict[str, Metric] = {"loss": MeanMetric()}
    if isinstance(config, TokenClassifierConfig):
        return metrics | _of_classes(config.num_labels)
    if not isinstance(config, SequenceClassifierConfig):
        return metrics | {"exact_match": ExactMatch(), "f1": OverlapF1()}
    if config.problem == "single_label_classification":
        return metrics | _of_classes(config.num_labels)
    if config.problem == "multi_label_classification":
        labels = config.num_labels
        return metrics | {"accuracy": MultilabelAccuracy(labels), "f1": MultilabelF1Score(labels)}
    metrics["mse"] = MeanSquaredError()
    return metrics | ({"pearson": PearsonCorrCoef()} if config.num_labels == 1 else {})


def _of_classes(count: int) -> dict[str, Metric]:
    return {
        "accuracy": MulticlassAccuracy(count, average="micro", ignore_index=IGNORED),
        "f1": MulticlassF1Score(count, average="macro", ignore_index=IGNORED),
    }


class ExactMatch(SQuAD):
    """Percentage of answers that match exactly, ignoring case, punctuation and articles."""

    def compute(self) -> Tensor:  # type: ignore[override]
        """The percentage over all ranks."""
        return super().compute()["exact_match"]


class OverlapF1(SQuAD):
    """Mean F1 of the answers' words, in percent."""

    def compute(self) -> Tensor:  # type: ignore[override]
        """The mean over all ranks."""
        return super().compute()["f1"]


def found_and_wanted(
    logits: Tensor, batch: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The predicted and the target answers in the format of torchmetrics' SQuAD.

    Args:
        logits: (batch, seq, 2), for first and last tokens.
        batch: `offsets`, `context` and `answers`, as described at the top of this file.
    """
    offsets = batch["offsets"]
    spans = best_spans(logits, offsets[..., 1] > 0)
    begins = offsets[..., 0].gather(1, spans[:, :1])[:, 0].tolist()
    ends = offsets[..., 1].gather(1, spans[:, 1:])[:, 0].tolist()
    texts = [text[begin:end] for text, begin, end in zip(batch["context"], begins, ends, strict=True)]
    found = [{"id": str(row), "prediction_text": text} for row, text in enumerate(texts)]
    wanted = [
        {"id": str(row), "answers": {"text": answers, "answer_start": [0] * len(answers)}}
        for row, answers in enumerate(batch["answers"])
    ]
    return found, wanted


def best_spans(logits: Tensor, is_text: Tensor, longest: int = LONGEST_ANSWER) -> Tensor:
    """The most likely span of each row: the highest sum of its first and last token's logits.

    Args:
        logits: (batch, seq, 2).
        is_text: (batch, seq) bool, the tokens that an answer may contain.
        longest: The most tokens in a span.

    Returns:
        (batch, 2) int64: the first token and the last.
    """
    scores = logits.float().masked_fill(~is_text[..., None], -torch.inf)
    seq = scores.shape[1]
    sums = scores.new_full((len(scores), min(longest, seq), seq), -torch.inf)
    for more in range(sums.shape[1]):
        sums[:, more, : seq - more] = scores[:, : seq - more, 0] + scores[:, more:, 1]
    best = sums.flatten(1).argmax(1)
    first, length = best % seq, best // seq
    return torch.stack([first, first + length], dim=1)
