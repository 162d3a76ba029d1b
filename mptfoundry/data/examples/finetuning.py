"""Load finetuning data: records in, batches out.

`cache.py` converts each record to an example once: `chat.py` splits it into turns, `turns.py` tokenizes them
and builds the loss mask. `rows.py` decides which examples share a row and in which order rows come.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from composer.core import DataSpec

from mptfoundry.config.data import FinetuningDatasetConfig, FinetuningLoaderConfig, sources_by_key
from mptfoundry.data.examples.cache import prepare_examples
from mptfoundry.data.examples.chat import CHATML
from mptfoundry.data.examples.rows import build_row_loader
from mptfoundry.data.examples.store import ExampleStore
from mptfoundry.data.loading import LoaderContext
from mptfoundry.data.records.records import counted, shown
from mptfoundry.errors import DataError
from mptfoundry.ranks import once_per_node, rank

MOST_COLUMNS_NAMED = 20

log = logging.getLogger(__name__)


def build_finetuning_loader(loader: FinetuningLoaderConfig, context: LoaderContext) -> DataSpec:
    """Build the loader of a dataset or mix.

    If the tokenizer has no chat template, it gets the one used to render conversations, so that checkpoints
    include it.

    Raises:
        ConfigError: A user function creates records, and the command line did not allow code.
        DataError: Records are missing, or more are bad or dropped than allowed.
    """
    stores, tokenizer = load_examples(loader, context), context.tokenizer
    for where, store in stores.items():
        if refusal := why_not(store, where, loader.dataset):
            raise DataError(str(refusal))
    if tokenizer.chat_template is None and any(each.meta["counts"]["chats"] for each in stores.values()):
        tokenizer.chat_template = CHATML
    return build_row_loader(stores, loader, context)


def load_examples(loader: FinetuningLoaderConfig, context: LoaderContext) -> dict[str, ExampleStore]:
    """Load each source's examples, by its key in the config; one process per node prepares them if needed.

    Raises:
        ConfigError: A user function creates records, and the command line did not allow code.
        DataError: Records are missing or can't be read.
    """
    sources = sources_by_key(loader, context.where)
    speaks = rank() == 0

    def say(text: str) -> None:
        if speaks:
            print(text, flush=True)

    def prepare() -> list[str]:
        return [
            str(prepare_examples(where, source, loader.dataset, context, say=say, progress=speaks))
            for where, source in sources.items()
        ]

    folders = once_per_node(prepare, what=f"{context.where}: preparing examples", say=say)
    stores = {where: ExampleStore(folder) for where, folder in zip(sources, folders, strict=True)}
    for where, store in stores.items():
        say(f"{where}: {describe(store)}")
        if speaks and (names := columns_not_read(store)):
            log.warning("%s: these columns of its records are not looked at: %s.", where, names)
        if speaks and (doubles := store.meta["counts"]["doubles"]):
            first, held = store.meta["counts"]["choices"][0], counted(doubles, "record")
            log.warning("%s: %s held two forms, of which one is read: %s", where, held, first)
    return stores


def describe(store: ExampleStore) -> str:
    """Describe a store in one line."""
    counts, tokens, trained = store.meta["counts"], int(store.lengths.sum()), int(store.trained.sum())
    parts = [counted(len(store), "example")]
    parts += [f"{counted(tokens, 'token')}, {trained / max(tokens, 1):.0%} of them in the loss"]
    parts += [f"{counts['cut']:,} cut at max_seq_len"] * bool(counts["cut"])
    parts += [f"{counts['dropped']:,} dropped"] * bool(counts["dropped"])
    parts += [f"{counted(counts['bad'], 'bad record')} left out"] * bool(counts["bad"])
    return "; ".join(parts)


def columns_not_read(store: ExampleStore) -> str:
    """List the ignored columns; a column that some good records lack comes with its number of records."""
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
    """Why a run can't start with a store.

    Attributes:
        reason: What is wrong.
        first: The first affected records, one per line, and how many more there are.
        advice: What to do.
    """

    reason: str
    first: str
    advice: str

    def __str__(self) -> str:
        return (
            f"{self.reason}:\n{self.first}\n{self.advice}" if self.first else f"{self.reason}. {self.advice}"
        )


def why_not(store: ExampleStore, where: str, allowed: FinetuningDatasetConfig) -> Refusal | None:
    """Explain why a run can't start: the store is empty or too many records are bad or dropped."""
    counts = store.meta["counts"]
    records = counted(counts["records"], "record")
    if counts["bad"] > allowed.max_bad_records:
        return Refusal(
            f"{where}: {counts['bad']:,} of {records} {'is' if counts['bad'] == 1 else 'are'} bad",
            "\n".join(first_of(counts["problems"], counts["bad"])),
            f"Fix them, or leave them out with dataset.max_bad_records: {counts['bad']}.",
        )
    share = counts["dropped"] / max(1, counts["records"])
    if share > allowed.max_dropped:
        return Refusal(
            f"{where}: {share:.1%} of the records are dropped, {counts['dropped']:,} of "
            f"{counts['records']:,}",
            "\n".join(first_of(counts["drops"], counts["dropped"])),
            "Use a larger max_seq_len or shorter prompts, or allow it with dataset.max_dropped: "
            f"{min(1.0, share + 0.005):.2f}.",
        )
    if not len(store):
        return Refusal(f"{where}: there are no examples", "", "Give records.")
    return None


def first_of(lines: Sequence[str], count: int) -> list[str]:
    """Format the first of `count` notes, one per line, and say how many more there are."""
    more = [f"... and {count - len(lines):,} more"] if count > len(lines) else []
    return [f"  {line}" for line in [*lines, *more]]
