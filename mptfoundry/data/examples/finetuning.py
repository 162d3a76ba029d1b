"""Examples for finetuning: records in, batches out.

Each record becomes an example once (`example_cache.py`): its turns (`chat.py`), their ids and what of them is
learned (`turns.py`). How examples share rows and in which order they come is told in `rows.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from composer.core import DataSpec
from composer.utils import dist

from mptfoundry.data.collate import filler_id
from mptfoundry.data.examples.cache import prepare_examples
from mptfoundry.data.examples.chat import CHATML
from mptfoundry.data.examples.order import passes
from mptfoundry.data.examples.rows import build_row_loader
from mptfoundry.data.examples.store import ExampleStore
from mptfoundry.data.examples.turns import Targets
from mptfoundry.data.records.records import counted, shown
from mptfoundry.data.records.sources import Source
from mptfoundry.errors import DataError
from mptfoundry.ranks import once_per_node

MOST_COLUMNS_NAMED = 20

log = logging.getLogger(__name__)


def build_finetuning_loader(
    *,
    sources: Mapping[str, Source],
    amounts: Sequence[float] | None = None,
    amounts_by: Literal["proportion", "repeat", "choose"] = "proportion",
    tokenizer: Any,
    max_seq_len: int,
    targets: Targets,
    cache: Path,
    max_bad_records: int = 0,
    max_dropped: float = 0.2,
    where: str = "train_loader",
    **rows: Any,
) -> DataSpec:
    """Build the loader of a data set or mix.

    Args:
        sources: The streams by name.
        amounts: How much of each an epoch reads; see `order.passes`. None: all of everything, once.
        amounts_by: What the amounts are.
        tokenizer: transformers' fast tokenizer. It gets the chat template that conversations were rendered
            with, if it has none, so that the template is saved with it.
        max_seq_len: Tokens of a row.
        targets: What is learned.
        cache: Folder of prepared examples.
        max_bad_records: How many records of a stream may be left out since they are not what they should be.
        max_dropped: The share of a stream's examples of which nothing to learn may be left.
        where: What the user calls this loader, for errors.
        rows: Further arguments of `build_row_loader`.

    Raises:
        DataError: Records are missing, or more of them are bad or dropped than allowed.
    """
    stores = load_examples(
        sources, tokenizer, max_seq_len=max_seq_len, targets=targets, cache=cache, where=where
    )
    for store, source in zip(stores, sources.values(), strict=True):
        judge(store, source.where, max_bad_records, max_dropped)
    if tokenizer.chat_template is None and any(store.meta["counts"]["chats"] for store in stores):
        tokenizer.chat_template = CHATML
    often = None if amounts is None else passes([len(store) for store in stores], amounts, by=amounts_by)
    return build_row_loader(
        stores,
        passes=often,
        max_seq_len=max_seq_len,
        pad_token_id=filler_id(tokenizer),
        fingerprints={
            source.where: store.fingerprint for source, store in zip(sources.values(), stores, strict=True)
        },
        where=where,
        **rows,
    )


def load_examples(
    sources: Mapping[str, Source],
    tokenizer: Any,
    *,
    max_seq_len: int,
    targets: Targets,
    cache: Path,
    where: str,
) -> list[ExampleStore]:
    """The streams' examples. Where they are not prepared, one process of each node does it."""
    speaks = dist.get_global_rank() == 0

    def say(text: str) -> None:
        if speaks:
            print(text, flush=True)

    def prepare() -> list[str]:
        options: dict[str, Any] = {"max_seq_len": max_seq_len, "targets": targets, "cache": cache, "say": say}
        return [
            str(prepare_examples(source, tokenizer, progress=speaks, **options))
            for source in sources.values()
        ]

    folders = once_per_node(prepare, what=f"{where}: preparing examples", say=say)
    stores = [ExampleStore(folder) for folder in folders]
    for store, source in zip(stores, sources.values(), strict=True):
        say(f"{source.where}: {describe(store)}")
        if speaks and (names := columns_not_read(store)):
            log.warning("%s: these columns of its records are not looked at: %s.", source.where, names)
        if speaks and (doubles := store.meta["counts"]["doubles"]):
            first, held = store.meta["counts"]["choices"][0], counted(doubles, "record")
            log.warning("%s: %s held two forms, of which one is read: %s", source.where, held, first)
    return stores


def describe(store: ExampleStore) -> str:
    """A store in one line."""
    counts, tokens, learned = store.meta["counts"], int(store.lengths.sum()), int(store.learned.sum())
    parts = [counted(len(store), "example")]
    parts += [f"{counted(tokens, 'token')}, {learned / max(tokens, 1):.0%} of them learned"]
    parts += [f"{counts['cut']:,} cut at max_seq_len"] * bool(counts["cut"])
    parts += [f"{counts['dropped']:,} dropped"] * bool(counts["dropped"])
    parts += [f"{counted(counts['bad'], 'bad record')} left out"] * bool(counts["bad"])
    return "; ".join(parts)


def columns_not_read(store: ExampleStore) -> str:
    """The columns that were not looked at, and in how many records, where it was not in all that are good."""
    counts = store.meta["counts"]
    good = counts["records"] - counts["bad"]
    names = [
        shown(name)[1:-1] + (f" (in {counted(number, 'record')})" if number < good else "")
        for name, number in sorted(counts["ignored"].items())
    ]
    more = [f"and {len(names) - MOST_COLUMNS_NAMED} more"] * (len(names) > MOST_COLUMNS_NAMED)
    return ", ".join([*names[:MOST_COLUMNS_NAMED], *more])


@dataclass(frozen=True)
class Refusal:
    """Why a run would not begin with a store.

    Attributes:
        reason: What is wrong.
        first: The first records that it is wrong with, a line each, and how many more there are.
        advice: What to do.
    """

    reason: str
    first: str
    advice: str

    def __str__(self) -> str:
        return (
            f"{self.reason}:\n{self.first}\n{self.advice}" if self.first else f"{self.reason}. {self.advice}"
        )


def why_not(store: ExampleStore, where: str, max_bad_records: int, max_dropped: float) -> Refusal | None:
    """Why a run would not begin: more records were left out of a store than the user allows."""
    counts = store.meta["counts"]
    records = counted(counts["records"], "record")
    if counts["bad"] > max_bad_records:
        return Refusal(
            f"{where}: {counts['bad']:,} of {records} {'is' if counts['bad'] == 1 else 'are'} bad",
            "\n".join(first_of(counts["problems"], counts["bad"])),
            f"Fix them, or leave them out with dataset.max_bad_records: {counts['bad']}.",
        )
    share = counts["dropped"] / max(1, counts["records"])
    if share > max_dropped:
        return Refusal(
            f"{where}: {share:.1%} of the examples are dropped, {counts['dropped']:,} of "
            f"{counts['records']:,}, since nothing to learn is left of them",
            "\n".join(first_of(counts["drops"], counts["dropped"])),
            "Use a larger max_seq_len or shorter prompts, or allow it with dataset.max_dropped: "
            f"{min(1.0, share + 0.005):.2f}.",
        )
    if not len(store):
        return Refusal(f"{where}: there are no examples", "", "Give records.")
    return None


def judge(store: ExampleStore, where: str, max_bad_records: int, max_dropped: float) -> None:
    """Raises DataError if more records were left out of a store than the user allows."""
    refusal = why_not(store, where, max_bad_records, max_dropped)
    if refusal is not None:
        raise DataError(str(refusal))


def first_of(lines: Sequence[str], count: int) -> list[str]:
    """The first notes of `count`, a line each, and how many more there are."""
    more = [f"... and {count - len(lines):,} more"] if count > len(lines) else []
    return [f"  {line}" for line in [*lines, *more]]
