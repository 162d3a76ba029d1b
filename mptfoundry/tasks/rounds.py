"""The ranks take turns at batches, and all of them get all answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from composer.utils import dist

from mptfoundry.mpt.network import MPT
from mptfoundry.ranks import rank, world_size
from mptfoundry.tasks.scoring import Batch

T = TypeVar("T")


@dataclass(frozen=True)
class Model:
    """What answers: a network in eval mode, its tokenizer, and whether its weights are sharded over ranks."""

    network: MPT
    tokenizer: object
    is_sharded: bool = False


def rounds(
    batches: Sequence[Batch], answer: Callable[[Batch], dict[int, T]], *, is_sharded: bool
) -> Iterator[dict[int, T]]:
    """The answers of all ranks, round after round.

    Sharded weights are gathered by all ranks together, so in a round they make the same number of passes: a
    round has batches of one kind, and a rank without a batch of its own repeats another one.

    Args:
        batches: The same on all ranks.
        answer: This rank's answers to a batch, by `doc_id`.
        is_sharded: Whether the weights are sharded over ranks.
    """
    for kind in (True, False):
        alike = [batch for batch in batches if bool(max(batch.prefixes)) == kind]
        for first in range(0, len(alike), world_size()):
            own = first + rank()
            answered: dict[int, T] = {}
            if own < len(alike) or is_sharded:
                answered = answer(alike[min(own, len(alike) - 1)])
            gathered = dist.all_gather_object(answered)
            yield {doc_id: each for answers in gathered for doc_id, each in answers.items()}
