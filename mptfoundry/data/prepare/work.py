"""Encode units of documents, in this process or in workers, which get the tokenizer as JSON."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mptfoundry.data.jobs import MOST_PROBLEMS_KEPT
from mptfoundry.data.prepare.encode import make_encoder
from mptfoundry.data.records.records import Document, Skipped, Unit, read_part
from mptfoundry.tokenizer import Borders


@dataclass(frozen=True)
class EncodingPlan:
    """Settings for encoding; sent to each worker once.

    Attributes:
        tokenizer_json: Content of `tokenizer.json`.
        dtype: Unsigned integer type of the ids.
        text_key: The record field with the text.
        borders: The ids before and after each document.
        as_text: Whether special tokens spelled out in the text are encoded as text.
        held_out: Fraction of documents that go to the held-out split.
        skip_bad_input: Whether to skip and count unreadable input instead of raising an error.
        datasets: Hugging Face datasets that parts refer to.
    """

    tokenizer_json: str
    dtype: str
    text_key: str
    borders: Borders
    as_text: bool
    held_out: float
    skip_bad_input: bool
    datasets: Sequence[Any] = ()


@dataclass
class Encoded:
    """One unit's ids for one split, as the bytes of an array, and the size of the text they came from."""

    ids: bytes = b""
    documents: int = 0
    text_bytes: int = 0


@dataclass
class UnitResult:
    """The result of a unit.

    Attributes:
        kept: The ids of the main split.
        held_out: The ids of the held-out split.
        skipped: Number of skipped documents or files, by reason.
        problems: Messages of the first ones that could not be read.
        weight: The unit's weight.
    """

    kept: Encoded
    held_out: Encoded
    skipped: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    weight: int = 0


def work_of(plan: EncodingPlan) -> Callable[[Unit], UnitResult]:
    """Return a function that encodes units by a plan."""
    return UnitEncoder(plan).encode


class UnitEncoder:
    """Encodes units with one tokenizer, using its cache of words."""

    def __init__(self, plan: EncodingPlan) -> None:
        self.plan = plan
        self.encoder = make_encoder(plan.tokenizer_json, plan.dtype, plan.as_text)
        self.before, self.after = (np.array(ids, plan.dtype).tobytes() for ids in plan.borders)

    def encode(self, unit: Unit) -> UnitResult:
        """Read and encode all documents of a unit.

        Raises:
            DataError: A document can't be read, and the plan does not skip bad input.
        """
        result = UnitResult(Encoded(), Encoded(), weight=unit.weight)
        pieces: dict[bool, list[bytes]] = {False: [], True: []}
        for part in unit.parts:
            for item in read_part(part, self.plan.text_key, self.plan.datasets):
                if isinstance(item, Document):
                    is_held_out = self._is_held_out(item)
                    pieces[is_held_out].append(self._encode(item))
                    split = result.held_out if is_held_out else result.kept
                    split.documents += item.is_end
                    split.text_bytes += item.size
                elif isinstance(item, Skipped):
                    result.skipped[item.reason] += 1
                elif self.plan.skip_bad_input:
                    result.skipped["bad input"] += 1
                    what = str(item).split(". ")[0]
                    result.problems = [*result.problems, what][:MOST_PROBLEMS_KEPT]
                else:
                    raise item
        result.kept.ids, result.held_out.ids = b"".join(pieces[False]), b"".join(pieces[True])
        return result

    def _encode(self, document: Document) -> bytes:
        before = self.before if document.is_start else b""
        after = self.after if document.is_end else b""
        return b"".join((before, self.encoder.encode(document.text), after))

    def _is_held_out(self, document: Document) -> bool:
        if not self.plan.held_out:
            return False
        digest = hashlib.blake2b(document.identity, digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.plan.held_out * 2**64
