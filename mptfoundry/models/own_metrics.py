"""Evaluation metrics of the user's own, which need the logits.

mptfoundry's loss never holds the logits of a batch whole. For these metrics the network runs a second time on
each evaluated batch, without labels; an evaluation takes about twice as long, and memory for its logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from mptfoundry import plugins
from mptfoundry.errors import ConfigError
from mptfoundry.evals.token_loss import TokenLoss, token_loss_rows
from mptfoundry.models.causal_lm import ComposerMPT
from mptfoundry.mpt.loss import IGNORED
from mptfoundry.mpt.network import MPTOutput


def make_metric(name: str, own: Any, kwargs: Mapping[str, Any]) -> Metric:
    """A metric from `plugins.metrics`: a class of torchmetrics', or a function of logits and labels."""
    key = f"eval_metrics.{name}"
    if not inspect.isclass(own):
        return TokenMean(key, partial(own, **kwargs))
    metric = plugins.call(key, own, **kwargs)
    if not isinstance(metric, Metric):
        text = f"{own.__name__} is not a torchmetrics.Metric. Derive it from one, or give a function."
        raise ConfigError(f"{key}: {text}")
    return metric


class TokenMean(TokenLoss):
    """The mean over all predicted tokens of what a function returns for each, exact on any number of ranks.

    Args:
        key: Where the config names the function.
        function: Takes logits (tokens, vocab) and labels (tokens,), and returns (tokens,) numbers or bools.
    """

    result = "LanguageCrossEntropy"  # of the rows below: the sum over all tokens by their number

    def __init__(self, key: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.key, self.function = key, function

    def update(self, batch: Mapping[str, Tensor], outputs: Any) -> None:
        """Add a batch and the network's `outputs.logits` (batch, seq, vocab)."""
        logits, labels = predictions(batch, outputs)
        values = plugins.call(self.key, self.function, logits, labels)
        if not isinstance(values, Tensor) or values.shape != labels.shape:
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            text = f"has to return a number for each of {len(labels)} tokens, and returned {shape}."
            raise ConfigError(f"{self.key}: {text}")
        sums = torch.zeros_like(batch["labels"], dtype=torch.float32)
        sums[:, :-1][batch["labels"][:, 1:] != IGNORED] = values.float()
        self.rows.append(token_loss_rows(sums, batch["labels"], batch.get("sample_id")))


class MeasuredMPT(ComposerMPT):
    """A language model whose evaluation also has metrics of the user's own."""

    def eval_forward(self, batch: Mapping[str, Any], outputs: MPTOutput | None = None) -> MPTOutput:
        """The output with each token's loss, and with the logits."""
        outputs = self(batch) if outputs is None else outputs
        given = {name: batch[name] for name in self.inputs if name in batch and name != "labels"}
        return outputs._replace(logits=self.model(batch["input_ids"], **given).logits)

    def update_metric(self, batch: Mapping[str, Tensor], outputs: Any, metric: Metric) -> None:
        """Add a batch to a metric; those of torchmetrics get the logits and labels of predicted tokens."""
        if isinstance(metric, TokenLoss):
            metric.update(batch, outputs)
        else:
            plugins.call("eval_metrics", metric.update, *predictions(batch, outputs))


def predictions(batch: Mapping[str, Tensor], outputs: Any) -> tuple[Tensor, Tensor]:
    """The logits (tokens, vocab) of a batch's predicted tokens, and their labels (tokens,)."""
    labels = batch["labels"][:, 1:]
    is_predicted = labels != IGNORED
    return outputs.logits[:, :-1][is_predicted], labels[is_predicted]
