"""The loss at each position of the context, for contexts up to any length.

Rows longer than the samples of the data are made by joining consecutive samples, which are consecutive text.
A row goes through the network in chunks, whose keys and values a cache keeps: memory grows with the length of
a row, not with its square. The first chunk is as long as the rows in training, so that rows of that length
are computed as in any other evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.utils import dist
from torch import Tensor

from mptfoundry.evals.token_loss import add_up, token_loss_rows
from mptfoundry.files import whole_or_absent
from mptfoundry.mpt.loss import IGNORED
from mptfoundry.mpt.network import MPT, KVCache
from mptfoundry.ranks import rank, world_size

# Buckets in the training length, and in each further training length.
_BUCKETS_WITHIN, _BUCKETS_BEYOND = 8, 2
# What an ordinary evaluation does not report either.
_NOT_SHOWN = ("bytes", "samples")


def position_buckets(length: int, trained: int) -> list[int]:
    """The first position of each bucket of a row of `length` tokens; narrower within the training length."""
    within = range(0, min(length, trained), max(1, trained // _BUCKETS_WITHIN))
    beyond = range(trained, length, max(1, trained // _BUCKETS_BEYOND))
    return [*within, *beyond]


def joined_rows(dataset: Any, joined: int) -> list[range]:
    """The samples of each row: up to `joined` consecutive ones of a stream.

    Args:
        dataset: A StreamingDataset.
        joined: Samples of a row.
    """
    rows = []
    offsets, counts = dataset.sample_offset_per_stream, dataset.samples_per_stream
    for first, count in zip(map(int, offsets), map(int, counts), strict=True):
        rows += [
            range(start, min(start + joined, first + count)) for start in range(first, first + count, joined)
        ]
    return rows


@torch.inference_mode()
def token_loss_in_chunks(network: MPT, ids: Tensor, labels: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """The loss of predicting each token from all before it, in chunks of a row.

    Args:
        network: In eval mode.
        ids: (batch, seq) int64.
        labels: (batch, seq) int64, aligned with `ids`; -100 for what is not predicted.
        chunk: Tokens of a chunk.

    Returns:
        token_loss (batch, seq) float32 and token_correct (batch, seq) bool; entry t is for the label at
        t + 1.
    """
    batch, seq = ids.shape
    if seq <= chunk:
        output = network(ids, labels=labels)
        return output.token_loss, output.token_correct
    cache = KVCache(network.config, batch, seq, device=ids.device, dtype=next(network.parameters()).dtype)
    losses = torch.zeros(batch, seq, device=ids.device)
    correct = torch.zeros(batch, seq, dtype=torch.bool, device=ids.device)
    for start in range(0, seq, chunk):
        # The next chunk's first token is the label of this one's last; the cache forgets it again.
        stop = min(start + chunk + 1, seq)
        output = network(ids[:, start:stop], labels=labels[:, start:stop], cache=cache)
        kept = min(start + chunk, seq)
        losses[:, start:kept] = output.token_loss[:, : kept - start]
        correct[:, start:kept] = output.token_correct[:, : kept - start]
        cache.length = kept
    return losses, correct


def evaluate_positions(
    network: MPT,
    dataset: Any,
    *,
    length: int,
    joined: int,
    batch_size: int,
    token_bytes: Tensor | None,
    is_sharded: bool,
) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
    """Evaluate all samples of a data set in rows of up to `length` tokens; all ranks call it.

    Args:
        network: In eval mode; the same on all ranks.
        dataset: A StreamingDataset of token ids.
        length: The most tokens of a row.
        joined: Samples of a row.
        batch_size: Rows of the training length in a batch; longer rows are fewer.
        token_bytes: (vocab_size,) the number of bytes that each token represents, for bits per byte.
        is_sharded: Whether the ranks have to compute the same number of batches.

    Returns:
        The results as of any evaluation (see token_loss.add_up); and first position of a bucket ->
        LanguageCrossEntropy, a mean over its tokens, and tokens. Tokens and sums of losses of the buckets add
        up to those of the results.
    """
    trained = network.config.max_seq_len
    edges = position_buckets(length, trained)
    rows = joined_rows(dataset, joined)
    size = max(1, batch_size * trained // max(trained, length))
    batches = [rows[first : first + size] for first in range(0, len(rows), size)]
    device = next(network.parameters()).device
    sums: list[Tensor] = []
    for first in range(0, len(batches), world_size()):
        own = first + rank()
        if own >= len(batches) and not is_sharded:
            break
        ids, labels = _stack(dataset, batches[min(own, len(batches) - 1)], length)
        losses, correct = token_loss_in_chunks(network, ids.to(device), labels.to(device), trained)
        if own < len(batches):
            numbers = torch.tensor([row[0] for row in batches[own]], device=device)
            whole = token_loss_rows(losses, labels.to(device), numbers, token_bytes, correct)
            sums.append(torch.cat([whole, _by_bucket(losses, labels.to(device), edges)], dim=1).cpu())
    gathered = [each for rank_sums in dist.all_gather_object(sums) for each in rank_sums]
    table = torch.cat(gathered)
    columns = [math.fsum(column) for column in table[:, 6:].T.tolist()]
    buckets = {
        edge: {"LanguageCrossEntropy": total / tokens, "tokens": tokens}
        for edge, total, tokens in zip(edges, columns[: len(edges)], columns[len(edges) :], strict=True)
        if tokens
    }
    results = {name: value for name, value in add_up(table[:, :6]).items() if name not in _NOT_SHOWN}
    return results, buckets


def _stack(dataset: Any, rows: Sequence[range], length: int) -> tuple[Tensor, Tensor]:
    """The ids and labels of some rows, each (rows, length), padded at the end."""
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    labels = torch.full((len(rows), length), IGNORED)
    for number, row in enumerate(rows):
        content = torch.from_numpy(np.concatenate([dataset.get_item(each)["input_ids"] for each in row]))
        ids[number, : len(content)] = content
        labels[number, : len(content)] = content
    return ids, labels


def _by_bucket(losses: Tensor, labels: Tensor, edges: Sequence[int]) -> Tensor:
    """Sums of losses and numbers of tokens of each row's buckets: (batch, 2 * buckets) float64.

    The loss at entry t is that of the token at position t + 1, which has t + 1 tokens before it.
    """
    predicted = labels[:, 1:] != IGNORED
    own = losses[:, :-1].double() * predicted
    bounds = [*edges, labels.shape[1]]
    spans = [slice(max(first, 1) - 1, max(stop, 1) - 1) for first, stop in pairwise(bounds)]
    totals = [own[:, span].sum(1) for span in spans]
    counts = [predicted[:, span].sum(1).double() for span in spans]
    return torch.stack([*totals, *counts], dim=1)


def draw_positions(
    buckets: Mapping[str, Mapping[int, Mapping[str, float]]], trained: int, length: int, path: Path
) -> None:
    """Plot the loss over the position in the context, a line for each label, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, losses in buckets.items():
        edges = list(losses)
        middles = [(one + other) / 2 for one, other in zip(edges, [*edges[1:], length], strict=True)]
        values = [each["LanguageCrossEntropy"] for each in losses.values()]
        axes.plot(middles, values, marker="o", markersize=3, linewidth=1, label=label)
    if length > trained:
        axes.axvline(trained, color="0.6", linestyle="--", linewidth=1)
        axes.annotate("training length", (trained, 1), xycoords=("data", "axes fraction"), va="bottom")
    axes.set_xlabel("position in the context, tokens")
    axes.set_ylabel("loss, nats per token")
    axes.grid(True, color="0.9")
    axes.legend()
    with whole_or_absent(path, overwrite=True) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
