"""Load batches of a dataset of the user's own, which a config names and a file of `code_paths` defines.

The dataset has `__len__`, and `__getitem__` that returns an item (see `items.py`). Order, ranks, padding
and the position in an epoch are those of finetuning rows, so a run resumes exactly. Start with
`build_own_loader`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from composer.core import DataSpec
from streaming import StreamingDataset
from torch.utils.data import DataLoader, Dataset

from mptfoundry import plugins
from mptfoundry.config.data import FROM_THE_RUN, OwnLoaderConfig
from mptfoundry.config.engine.signatures import own_arguments, own_parameters
from mptfoundry.data.collate import RowCollator, count_rows, count_tokens, filler_id
from mptfoundry.data.examples.order import HOW_TO_CONTINUE, RowSampler
from mptfoundry.data.examples.packing import shuffled
from mptfoundry.data.loading import LoaderContext, loader_options, raise_plainly
from mptfoundry.data.own.items import Items
from mptfoundry.data.records.records import counted
from mptfoundry.data.shards.token_ids import NOT_IN_LOSS
from mptfoundry.errors import ConfigError, DataError
from mptfoundry.ranks import once_per_node, rank, ranks_that_differ, say, world_size


def build_own_loader(loader: OwnLoaderConfig, context: LoaderContext) -> DataSpec:
    """Build the loader of the user's dataset that `loader.name` names.

    Returns:
        A Composer DataSpec; `RowCollator` describes its batches.

    Raises:
        ConfigError: The code did not run, the class fails, or what it makes can't be indexed.
        DataError: The dataset is empty or too small, an item is wrong, or not the same on all ranks.
    """
    where, items = context.where, open_items(loader, context)
    options = loader_options(loader, context)
    # A worker that starts as a new Python could not import the class.
    options["multiprocessing_context"] = "fork" if context.num_workers else None
    if len(items) < (context.device_batch_size * world_size() if options["drop_last"] else 1):
        raise DataError(
            f"{where}: {counted(len(items), 'item')} can't fill one batch of {context.device_batch_size} on "
            f"each of {world_size()} devices. Use a smaller batch, more items, or drop_last: false."
        )
    seed = context.seed if context.shuffles(loader) else None
    order = ItemOrder(len(items), seed, varies=context.is_training)
    sampler = RowSampler(order, rank=rank(), ranks=world_size(), drop_last=options["drop_last"])
    fingerprints = {where: _fingerprint(items, context)}
    say(f"{where}: {counted(len(items), 'item')} in an epoch")
    return DataSpec(
        ItemLoader(
            ItemDataset(items, sampler, fingerprints, context),
            sampler=sampler,
            collate_fn=ItemCollator(RowCollator(context.max_seq_len, filler_id(context.tokenizer))),
            **options,
        ),
        get_num_samples_in_batch=count_rows,
        get_num_tokens_in_batch=count_tokens,
    )


def open_items(loader: OwnLoaderConfig, context: LoaderContext) -> Items:
    """The items of the user's dataset.

    The first process of each node makes the dataset first, so that the others can use the files it writes.

    Raises:
        ConfigError: The code did not run, the class fails, or what it makes can't be indexed.
    """
    where, own = context.where, plugins.datasets.get(loader.name)
    if own is None:
        raise ConfigError(
            f"{where}.name: {loader.name} is a dataset of your own, whose code did not run. Say "
            "allow_code=true on the command line."
        )
    names = {each.name for each in own_parameters(own)}
    of_run = {name: getattr(context, name) for name in FROM_THE_RUN if name in names}
    made: list[Any] = []

    def make() -> None:
        made.append(plugins.call(where, own, **own_arguments(loader, OwnLoaderConfig), **of_run))

    once_per_node(make, what=f"{where}: {plugins.described(own)}")
    if not made:
        make()
    if problem := _why_no_dataset(made[0]):
        raise ConfigError(f"{where}: {plugins.described(own)} {problem}")
    count = plugins.call(where, type(made[0]).__len__, made[0])
    return Items(made[0], count, plugins.described(own), context)


def _why_no_dataset(made: Any) -> str | None:
    if isinstance(made, StreamingDataset):
        return (
            "is a StreamingDataset, which orders and shares out its samples itself. Read MDS shards with "
            "name: text, or those on this machine with a streaming.LocalDataset."
        )
    missing = [name for name in ("__len__", "__getitem__") if not hasattr(made, name)]
    if missing:
        return (
            f"has no {' and no '.join(missing)}. Give a class whose items are read by their number, so that "
            "a run can resume at any of them."
        )
    return None


def _fingerprint(items: Items, context: LoaderContext) -> str:
    """A hash of the number of items and of three of them.

    Raises:
        DataError: The items differ between ranks, or when they are read again.
    """
    *contents, again = _read([0, len(items) // 2, len(items) - 1, 0], items, context)
    digest = hashlib.sha256(b"".join([repr(len(items)).encode(), *contents])).hexdigest()
    if contents[0] != again:
        raise DataError(
            f"{items.place(0)} is not the same when it is read twice, so a run could not resume exactly. "
            "Seed what it draws at random with the number of the item."
        )
    if others := ranks_that_differ(digest):
        raise DataError(
            f"{context.where}: the items of rank {others[0]} are not those of rank 0. Give all machines the "
            "same data, and seed what is drawn at random."
        )
    return digest


def _read(numbers: list[int], items: Items, context: LoaderContext) -> list[bytes]:
    """Read some items as bytes, in a worker if the run has workers. If the dataset opened a file in this
    process, the workers forked later would all share its offset.
    """
    workers = {"num_workers": 1, "multiprocessing_context": "fork"} if context.num_workers else {}
    contents = _Contents(items)
    loader = ItemLoader(contents, None, sampler=numbers, generator=torch.Generator(), **workers)  # type: ignore[arg-type]
    read: list[bytes] = list(loader)
    items.is_quiet = True
    return read


class _Contents(Dataset):
    """The content of each item, as bytes."""

    def __init__(self, items: Items) -> None:
        self.items = items

    def __getitem__(self, number: int) -> bytes:
        return self.items.bytes_of(number)


@dataclass(frozen=True)
class ItemOrder:
    """The numbers of the items in the order of each epoch.

    Attributes:
        count: Number of items.
        seed: Seed of the order; None does not shuffle.
        varies: Whether epochs differ. If False, every epoch is the same as the first.
    """

    count: int
    seed: int | None
    varies: bool

    def __len__(self) -> int:
        return self.count

    def epoch(self, number: int) -> np.ndarray:
        """The order of epoch `number`, counted from 0, (count,) int64."""
        if self.seed is None:
            return np.arange(self.count)
        return shuffled(self.count, self.seed, 0, number if self.varies else 0)


class ItemDataset(Dataset):
    """The items that the sampler picks, as rows, and the position in an epoch.

    Args:
        items: The user's items.
        sampler: The sampler that `load_state_dict` repositions.
        fingerprints: The content fingerprint, by the loader's key in the config.
        context: What the loader needs from the run.
    """

    def __init__(
        self, items: Items, sampler: RowSampler, fingerprints: dict[str, str], context: LoaderContext
    ) -> None:
        order: Any = sampler.order
        self.items = items
        self.fingerprints = fingerprints
        self.where = context.where
        self._sampler = sampler
        self._takes_other_rows = context.takes_other_rows
        self._rows_of = f"{len(items)} items, seed {order.seed}"

    def __len__(self) -> int:
        """Items per epoch, over all ranks."""
        return len(self.items)

    def __getitem__(self, number: Any) -> dict[str, Any]:
        """Read a row for `ItemCollator`; a rank that has run out of items asks for an empty one."""
        if isinstance(number, tuple):
            none = np.empty(0, np.int64)
            return {
                "input_ids": none,
                "labels": none,
                "trained": none,
                "lengths": none,
                "sample_id": number[0],
            }
        item = self.items[int(number)]
        return {**vars(item), "trained": item.labels != NOT_IN_LOSS, "sample_id": int(number)}

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Return the epoch, how many of its items all ranks have read, and what their order depends on."""
        return self._sampler.place(num_samples, self._rows_of)

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Resume at the state's position.

        Raises:
            DataError: The position is inside an epoch of other items, and the run doesn't allow that.
        """
        if not self._sampler.resume_at(state or {}, self._rows_of, takes_other_rows=self._takes_other_rows):
            raise DataError(
                f"{self.where}: the checkpoint was saved inside an epoch with another order of items: their "
                "number, shuffle or the seed changed since then. " + HOW_TO_CONTINUE
            )


@dataclass(frozen=True)
class ItemCollator:
    """Collate items like rows of examples, with labels that need not be the input ids."""

    rows: RowCollator

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate items into a batch."""
        batch = self.rows(items)
        for place, item in enumerate(items):
            batch["labels"][place, : len(item["labels"])] = torch.from_numpy(item["labels"])
        return batch


class ItemLoader(DataLoader):
    """A DataLoader that raises a worker's DataError as plain text."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except DataError as error:
            raise_plainly(error, self._iterator)
