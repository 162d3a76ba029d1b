"""Log-likelihoods of answers, where the context that several choices share is computed once.

The rows of a question that begin with the same tokens share that prefix: the network reads it once, its keys
and values are repeated for the rows, and each row continues with what is its own. Questions are batched by
length, and the batches depend on nothing but the questions: results are the same on any number of ranks, and
after a restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mptfoundry.mpt.network import MPT, KVCache
from mptfoundry.tasks.questions import Question, Row

# A shorter shared prefix costs more in a second pass than it saves.
_SHORTEST_PREFIX = 8


@dataclass(frozen=True)
class Score:
    """How likely an answer is.

    Attributes:
        logprobs: Of each of its tokens, in nats.
        is_greedy: Whether each token is the most likely one.
        confidence: The probability of the most likely token at the answer's least certain position.
    """

    logprobs: tuple[float, ...]
    is_greedy: bool
    confidence: float

    @property
    def total(self) -> float:
        """Log-likelihood of the whole answer, in nats."""
        return sum(self.logprobs)

    @property
    def mean(self) -> float:
        """Mean log-likelihood of its tokens, in nats."""
        return self.total / len(self.logprobs)


@dataclass(frozen=True)
class Batch:
    """Questions that are scored together, and the length of the prefix that each one's rows share."""

    questions: tuple[Question, ...]
    prefixes: tuple[int, ...]


def shared_prefix(rows: Sequence[Row]) -> int:
    """The number of first tokens to read once: equal in all rows, and before all of their answers.

    The last token of a context is not among them, because it predicts the answer's first token. For a single
    row they are the rest of its context, whose logits are then never computed.
    """
    most = min(row.start for row in rows) - 1
    first = rows[0].ids
    equal = next((n for n in range(most) if any(row.ids[n] != first[n] for row in rows[1:])), most)
    return equal if equal >= _SHORTEST_PREFIX else 0


def plan_batches(questions: Sequence[Question], tokens: int) -> list[Batch]:
    """Group questions of similar length; the order depends on the questions alone.

    Args:
        questions: In any order.
        tokens: The most tokens, with padding, of a batch of more than one question.
    """
    prefixes = {question.doc_id: shared_prefix(question.rows) for question in questions}
    longest = {question.doc_id: max(len(row.ids) for row in question.rows) for question in questions}

    def width(members: Sequence[Question]) -> int:
        return max(prefixes[each.doc_id] for each in members) + max(
            longest[each.doc_id] - prefixes[each.doc_id] for each in members
        )

    batches: list[list[Question]] = []
    for question in sorted(
        questions, key=lambda each: (-prefixes[each.doc_id], -longest[each.doc_id], each.doc_id)
    ):
        more = [*(batches[-1] if batches else []), question]
        rows = sum(len(each.rows) for each in more)
        # Batches with and without prefixes are apart: they take two forward passes and one.
        is_alike = bool(prefixes[more[0].doc_id]) == bool(prefixes[question.doc_id])
        if batches and is_alike and width(more) * rows <= tokens:
            batches[-1] = more
        else:
            batches.append([question])
    return [Batch(tuple(each), tuple(prefixes[question.doc_id] for question in each)) for each in batches]


@torch.no_grad()  # not inference_mode: FSDP would keep its tensors, and training can't write to those
def score_batch(network: MPT, batch: Batch) -> dict[int, list[Score]]:
    """Score the rows of a batch's questions with a network in eval mode: doc_id -> a score for each row."""
    device = next(network.parameters()).device
    cache, numbers = _read_prefixes(network, batch, device)
    rows = [
        Row(row.ids[prefix:], row.start - prefix)
        for question, prefix in zip(batch.questions, batch.prefixes, strict=True)
        for row in question.rows
    ]
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        mask[number, : len(row.ids)] = True
    if cache is not None:
        cache = _for_rows(network, cache, numbers, width)
    logits = network(
        ids.to(device), attention_mask=None if mask.all() else mask.to(device), cache=cache
    ).logits
    scores = [_score(logits[number], row) for number, row in enumerate(rows)]
    taken = iter(scores)
    return {question.doc_id: [next(taken) for _ in question.rows] for question in batch.questions}


def _score(logits: torch.Tensor, row: Row) -> Score:
    """The score of a row, from its logits (width, vocab)."""
    answer = torch.tensor(row.ids[row.start :], device=logits.device)
    probabilities = logits[row.start - 1 : len(row.ids) - 1].float().log_softmax(-1)
    highest, likeliest = probabilities.max(-1)
    return Score(
        tuple(probabilities.gather(-1, answer[:, None])[:, 0].tolist()),
        bool((likeliest == answer).all()),
        float(highest.min().exp()),
    )


def _read_prefixes(network: MPT, batch: Batch, device: torch.device) -> tuple[KVCache | None, torch.Tensor]:
    """The keys and values of each question's shared prefix, padded on the left, and each row's question."""
    sizes = torch.tensor([len(question.rows) for question in batch.questions], device=device)
    numbers = torch.repeat_interleave(torch.arange(len(sizes), device=device), sizes)
    longest = max(batch.prefixes)
    if not longest:
        return None, numbers
    ids = torch.zeros(len(batch.questions), longest, dtype=torch.int64)
    mask = torch.zeros(len(batch.questions), longest, dtype=torch.bool)
    for number, (question, prefix) in enumerate(zip(batch.questions, batch.prefixes, strict=True)):
        ids[number, longest - prefix :] = torch.tensor(question.rows[0].ids[:prefix])
        mask[number, longest - prefix :] = True
    cache = KVCache(network.config, len(ids), longest, device=device, dtype=next(network.parameters()).dtype)
    mask_or_none = None if mask.all() else mask.to(device)
    network(ids.to(device), attention_mask=mask_or_none, cache=cache, last_only=True)
    return cache, numbers


def _for_rows(network: MPT, cache: KVCache, numbers: torch.Tensor, more: int) -> KVCache:
    """Repeat the cache's questions for their rows, with room for `more` tokens."""
    length = cache.length
    rows = KVCache(
        network.config, len(numbers), length + more, device=numbers.device, dtype=cache.storage.dtype
    )
    rows.storage[:, :, :, :, :length] = cache.storage[:, :, numbers]
    rows.length = length
    if cache.documents is not None:
        rows.documents = torch.zeros(len(numbers), length + more, dtype=torch.int64, device=numbers.device)
        rows.documents[:, :length] = cache.documents[numbers]
    return rows
