"""Batches of rows of examples: packed or one example a row, of one store or a mix of several.

What one reads here first is `build_row_loader`. Which examples share a row says `packing.py`, which rows come
when and where `order.py`, and what a batch looks like `collate.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from composer.core import DataSpec
from composer.utils import dist
from torch.utils.data import DataLoader, Dataset

from mptfoundry.data.collate import RowCollator, count_row_tokens, count_rows, worker_options
from mptfoundry.data.examples.order import Dealer, RowOrder
from mptfoundry.data.examples.packing import plan_packing
from mptfoundry.data.examples.store import ExampleStore
from mptfoundry.data.records.records import counted
from mptfoundry.errors import DataError

# The number of a row that stands for none, and what it holds.
NO_ROW = -1
NOTHING = (np.empty(0, np.int64), np.empty(0, bool), np.empty(0, np.int64))


def build_row_loader(
    stores: Sequence[ExampleStore],
    *,
    passes: Sequence[float] | None = None,
    max_seq_len: int,
    packing_ratio: float | Literal["auto"] | None,
    pad_token_id: int,
    device_batch_size: int,
    shuffle: bool,
    seed: int,
    drop_last: bool,
    is_training: bool = True,
    trims_padding: bool = False,
    num_workers: int = 0,
    pin_memory: bool = False,
    prefetch_factor: int = 2,
    persistent_workers: bool = True,
    timeout: float = 0,
    fingerprints: Mapping[str, str] | None = None,
    takes_other_rows: bool = False,
    where: str = "train_loader",
) -> DataSpec:
    """Build the loader of a data set or mix.

    Args:
        stores: The streams' examples.
        passes: How often an epoch reads each stream, on average; each is then packed by itself. None: each
            example comes once in an epoch, and all are packed together.
        max_seq_len: Tokens of a row.
        packing_ratio: Examples in a row, on average: `auto`, as many as fit; None, one.
        pad_token_id: What fills rows; it is masked by place.
        device_batch_size: Rows in a batch of one device.
        shuffle: Read the rows in an order that belongs to `seed` and the epoch. Without it packing still puts
            examples together by their lengths.
        seed: Of the order.
        drop_last: Leave out a last batch that is not full. Otherwise ranks that have no row left for it get
            rows of which nothing is learned.
        is_training: Epochs differ, and a run can be resumed inside of one. An evaluation is always the first.
        trims_padding: Cut rows behind the longest of the batch.
        num_workers: Processes that read; 0 reads in the training process.
        fingerprints: The stores' content, by the streams' keys in the config.
        takes_other_rows: Continue inside an epoch although a checkpoint was saved with other rows.
        where: What the user calls this loader, for errors.

    Returns:
        Composer's DataSpec; batches are those of `RowCollator`. `dataloader.dataset.order` tells how rows
        are packed.

    Raises:
        DataError: Examples are too long, nothing of them is learned, or they don't fill a batch.
    """
    _check(stores, max_seq_len, where)
    together = [np.concatenate([store.lengths for store in stores])]
    streams = [
        plan_packing(lengths, max_seq_len, packing_ratio, (seed, number) if shuffle else None)
        for number, lengths in enumerate(together if passes is None else [store.lengths for store in stores])
    ]
    drawn = [round(often * one.rows) for often, one in zip(passes or [1], streams, strict=True)]
    order = RowOrder(streams, drawn, seed if shuffle else None, varies=is_training)
    ranks, rank = dist.get_world_size(), dist.get_global_rank()
    if rank == 0:
        print(*packing_lines(order, packing_ratio, where), sep="\n", flush=True)
    if len(order) < (device_batch_size * ranks if drop_last else 1):
        raise DataError(
            f"{where}: {counted(len(order), 'row')} can't fill one batch of {device_batch_size} on each of "
            f"{ranks} devices. Use a smaller batch, more examples, a smaller packing_ratio, or drop_last: "
            "false."
        )
    empty = (NO_ROW, np.empty(0, np.int64))
    dealer = Dealer(order.epoch, len(order), rank=rank, ranks=ranks, drop_last=drop_last, filler=empty)
    loader: DataLoader[Any] = DataLoader(
        RowDataset(stores, order, dealer, where, fingerprints or {}, takes_other_rows),
        batch_size=device_batch_size,
        sampler=dealer,
        collate_fn=RowCollator(max_seq_len, pad_token_id, trims_padding),
        drop_last=drop_last,
        pin_memory=pin_memory,
        **worker_options(num_workers, prefetch_factor, persistent_workers, timeout),
        # Its own generator: making an iterator must not advance the random state that dropout uses.
        generator=torch.Generator().manual_seed(seed),
    )
    return DataSpec(loader, get_num_samples_in_batch=count_rows, get_num_tokens_in_batch=count_row_tokens)


def packing_lines(order: RowOrder, asked: float | Literal["auto"] | None, where: str) -> list[str]:
    """What a user should know of how examples are packed, a line for each stream that is packed by itself."""
    lines = []
    for one in order.streams:
        fits = (
            f", where {asked:g} do not fit"
            if isinstance(asked, (int, float)) and one.ratio < 0.99 * asked
            else ""
        )
        lines.append(
            f"{where}: {counted(len(one.lengths), 'example')} in {counted(one.rows, 'row')} of "
            f"{counted(one.row_len, 'token')}: "
            f"{one.ratio:.1f} in a row{fits}; {1 - one.fill:.1%} is padding."
        )
    return lines


class RowDataset(Dataset):
    """Reads rows as the dealer names them, and tells Composer where an epoch stands.

    Args:
        stores: The streams' examples.
        order: How they are packed.
        dealer: Goes on where a checkpoint says.
        where: What the user calls this loader, for errors.
        fingerprints: The stores' content, by the streams' keys in the config.
        takes_other_rows: Continue inside an epoch although a checkpoint was saved with other rows.
    """

    def __init__(
        self,
        stores: Sequence[ExampleStore],
        order: RowOrder,
        dealer: Dealer,
        where: str,
        fingerprints: Mapping[str, str],
        takes_other_rows: bool = False,
    ) -> None:
        self.stores = list(stores)
        self._takes_other_rows = takes_other_rows
        self.fingerprints = dict(fingerprints)
        self.order = order
        self.where = where
        self._dealer = dealer
        self._firsts = np.cumsum([0, *(len(store) for store in stores)])
        plan = (order.seed, list(order.drawn), *((one.row_len, one.rows) for one in order.streams))
        lengths = hashlib.sha256(repr(plan).encode())
        for store in stores:
            lengths.update(store.lengths.tobytes())
        self._digest = lengths.hexdigest()

    def __len__(self) -> int:
        """Rows of an epoch, of all ranks."""
        return len(self.order)

    def __getitem__(self, row: tuple[int, np.ndarray]) -> dict[str, Any]:
        """A row as `RowCollator` takes it, its examples in the order of the stores."""
        number, members = row
        streams = np.searchsorted(self._firsts, members, side="right") - 1
        found = [self._read(stream, members[streams == stream]) for stream in sorted(set(streams.tolist()))]
        parts = found[0] if len(found) == 1 else map(np.concatenate, zip(*found or [NOTHING], strict=True))
        return {**dict(zip(("input_ids", "learned", "lengths"), parts, strict=True)), "sample_id": number}

    def _read(self, stream: int, members: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Examples of one store end to end: ids, learned and lengths."""
        indices, store = members - self._firsts[stream], self.stores[stream]
        return *store.join(indices), store.lengths[indices]

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """What a checkpoint keeps: the epoch, how many of its rows all ranks have read, and of what."""
        return {"epoch": self._dealer.epoch, "row": num_samples, "rows_of": self._digest}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Continue where the state says.

        Raises:
            DataError: That is inside an epoch of other rows, which are not taken.
        """
        place = state or {}
        if place.get("row") == 0:
            return
        is_taken = place.get("rows_of") == self._digest or (self._takes_other_rows and "row" in place)
        if not is_taken:
            raise DataError(
                f"{self.where}: the checkpoint stands in the middle of an epoch of other rows: the examples, "
                "their mix, packing_ratio, max_seq_len or seed have changed since. Restore them, name what "
                "has changed in allow_changes, or start a new run from its weights, with load_path and "
                "load_weights_only: true."
            )
        self._dealer.resume(int(place["epoch"]), int(place["row"]))


def _check(stores: Sequence[ExampleStore], max_seq_len: int, where: str) -> None:
    for store in stores:
        if len(store) and store.lengths.max() > max_seq_len:
            raise DataError(
                f"{where}: {store.folder} has an example of {store.lengths.max()} tokens; max_seq_len is "
                f"{max_seq_len}. Set max_seq_len: {store.lengths.max()}, or prepare the examples again."
            )
        # A batch of which nothing is learned has no mean loss.
        if not store.learned.all():
            raise DataError(
                f"{where}: nothing is learned of example {store.learned.argmin()} of {store.folder}. "
                f"Leave such examples out."
            )
