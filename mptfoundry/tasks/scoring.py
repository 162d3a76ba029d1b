"""Log-likelihoods of answers, where the context that several choices share is computed once.

The rows of a question that begin with the same tokens share that prefix: the network reads it once, its keys
and values are repeated for the rows, and each row continues with what is its own. Questions are batched by
length, and the batches depend on nothing but the questions. The ranks take turns at them: results are the
same on any number of ranks, and after a restart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from composer.utils import dist

from mptfoundry.mpt.network import MPT, KVCache
from mptfoundry.ranks import rank, world_size
from mptfoundry.tasks.questions import Question, Row

T = TypeVar("T")
# A shorter shared prefix costs more in a second pass than it saves.
_SHORTEST_PREFIX = 8


@dataclass(frozen=True)
class Model:
    """What answers: a network in eval mode, its tokenizer, and whether its weights are sharded over ranks."""

    network: MPT
    tokenizer: object
    is_sharded: bool = False


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


def plan_rounds(batches: Sequence[Batch], *, is_sharded: bool) -> list[Batch | None]:
    """Let the ranks take turns at the batches; returns this rank's batch of each round, None without one.

    Sharded weights are gathered by all ranks together, so in a round they make the same number of passes: a
    round has batches of one kind, and a rank without a batch of its own repeats another one.

    Args:
        batches: The same on all ranks.
        is_sharded: Whether the weights are sharded over ranks.
    """
    rounds: list[Batch | None] = []
    for kind in (True, False):
        alike = [batch for batch in batches if bool(max(batch.prefixes)) == kind]
        for first in range(0, len(alike), world_size()):
            own = first + rank()
            has_turn = own < len(alike) or is_sharded
            rounds.append(alike[min(own, len(alike) - 1)] if has_turn else None)
    return rounds


def rounds(
    batches: Sequence[Batch], answer: Callable[[Batch], dict[int, T]], *, is_sharded: bool
) -> Iterator[dict[int, T]]:
    """The answers of all ranks by `doc_id`, round after round; `answer` gives this rank's to a batch."""
    for batch in plan_rounds(batches, is_sharded=is_sharded):
        yield gathered({} if batch is None else answer(batch))


def gathered(answered: dict[int, T]) -> dict[int, T]:
    """The answers of all ranks to a round; all ranks call it."""
    return {doc_id: each for answers in dist.all_gather_object(answered) for doc_id, each in answers.items()}


@torch.no_grad()  # not inference_mode: FSDP would keep its tensors, and training can't write to those
def score_batch(network: MPT, batch: Batch) -> dict[int, list[Score]]:
    """Score the rows of a batch's questions with a network in eval mode: doc_id -> a score for each row."""
    device = next(network.parameters()).device
    rows = [
        (number, Row(row.ids[prefix:], row.start - prefix))
        for number, (question, prefix) in enumerate(zip(batch.questions, batch.prefixes, strict=True))
        for row in question.rows
    ]
    # A row's last token predicts nothing, and answers of one token differ in nothing else.
    inputs = {(number, row.ids[:-1]): 0 for number, row in rows}
    inputs = {each: place for place, each in enumerate(inputs)}
    width = max(len(tokens) for _, tokens in inputs)
    ids = torch.zeros(len(inputs), width, dtype=torch.int64)
    mask = torch.zeros(len(inputs), width, dtype=torch.bool)
    for place, (_, tokens) in enumerate(inputs):
        ids[place, : len(tokens)] = torch.tensor(tokens)
        mask[place, : len(tokens)] = True
    cache = _read_prefixes(network, batch, device)
    if cache is not None:
        numbers = torch.tensor([number for number, _ in inputs], device=device)
        cache = _for_rows(network, cache, numbers, width)
    logits = network(
        ids.to(device), attention_mask=None if mask.all() else mask.to(device), cache=cache
    ).logits
    scores: dict[int, list[Score]] = {question.doc_id: [] for question in batch.questions}
    for number, row in rows:
        doc_id = batch.questions[number].doc_id
        scores[doc_id].append(_score(logits[inputs[number, row.ids[:-1]]], row))
    return scores


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


def _read_prefixes(network: MPT, batch: Batch, device: torch.device) -> KVCache | None:
    """The keys and values of each question's shared prefix, padded on the left."""
    longest = max(batch.prefixes)
    if not longest:
        return None
    ids = torch.zeros(len(batch.questions), longest, dtype=torch.int64)
    mask = torch.zeros(len(batch.questions), longest, dtype=torch.bool)
    for number, (question, prefix) in enumerate(zip(batch.questions, batch.prefixes, strict=True)):
        ids[number, longest - prefix :] = torch.tensor(question.rows[0].ids[:prefix])
        mask[number, longest - prefix :] = True
    cache = KVCache(network.config, len(ids), longest, device=device, dtype=next(network.parameters()).dtype)
    mask_or_none = None if mask.all() else mask.to(device)
    network(ids.to(device), attention_mask=mask_or_none, cache=cache, last_only=True)
    return cache


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
