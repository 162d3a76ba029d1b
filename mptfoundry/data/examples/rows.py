"""Load batches of rows of examples, packed or one example per row, from one store or a mix.

Start with `build_row_loader`. `packing.py` decides which examples share a row, `order.py` which rank reads
which row when, and `collate.py` builds batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from composer.core import DataSpec
from torch.utils.data import DataLoader, Dataset

from mptfoundry.config.data import FinetuningDatasetConfig, FinetuningLoaderConfig
from mptfoundry.data.collate import RowCollator, count_rows, count_tokens, filler_id
from mptfoundry.data.examples.order import HOW_TO_CONTINUE, RowOrder, RowSampler, passes
from mptfoundry.data.examples.packing import plan_packing
from mptfoundry.data.examples.store import ExampleStore
from mptfoundry.data.loading import LoaderContext, loader_options
from mptfoundry.data.records.records import counted
from mptfoundry.errors import DataError
from mptfoundry.ranks import rank, world_size

# The content of an empty row.
NOTHING = (np.empty(0, np.int64), np.empty(0, bool), np.empty(0, np.int64))


def build_row_loader(
    stores: Mapping[str, ExampleStore], loader: FinetuningLoaderConfig, context: LoaderContext
) -> DataSpec:
    """Build the loader of a dataset or mix.

    If the config sets amounts, each source is packed separately. Otherwise all sources are packed together,
    and each example comes once per epoch. Packing groups examples by length, even without shuffling. If
    `drop_last` is false, ranks without a row for the last batch get empty rows.

    Args:
        stores: The examples of each source, by its key in the config.
        loader: The loader's section of the config.
        context: What the loader needs from the run.

    Returns:
        A Composer DataSpec; `RowCollator` describes its batches. `dataloader.dataset.order` has the packing.

    Raises:
        DataError: Examples are too long, have no token in the loss, or don't fill a batch.
    """
    where, dataset = context.where, loader.dataset
    _check(stores.values(), context.max_seq_len, where)
    seed = context.seed if context.shuffles(loader) else None
    order = plan_order([store.lengths for store in stores.values()], dataset, context, seed)
    if rank() == 0:
        print(*packing_lines(order, dataset.packing_ratio, where), sep="\n", flush=True)
    options = loader_options(loader, context)
    if len(order) < (context.device_batch_size * world_size() if options["drop_last"] else 1):
        raise DataError(
            f"{where}: {counted(len(order), 'row')} can't fill one batch of {context.device_batch_size} on "
            f"each of {world_size()} devices. Use a smaller batch, more examples, a smaller packing_ratio, "
            "or drop_last: false."
        )
    sampler = RowSampler(order, rank=rank(), ranks=world_size(), drop_last=options["drop_last"])
    return DataSpec(
        DataLoader(
            RowDataset(stores, order, sampler, context),
            sampler=sampler,
            collate_fn=RowCollator(
                context.max_seq_len, filler_id(context.tokenizer), dataset.allow_pad_trimming
            ),
            **options,
        ),
        get_num_samples_in_batch=count_rows,
        get_num_tokens_in_batch=count_tokens,
    )


def plan_order(
    lengths: Sequence[np.ndarray], dataset: FinetuningDatasetConfig, context: LoaderContext, seed: int | None
) -> RowOrder:
    """Pack examples and order the rows by `seed`. Each source's `lengths` are (examples,)."""
    by, amounts = dataset.amounts
    often = [1.0] if amounts is None else passes([len(each) for each in lengths], amounts, by=by)
    packed = [np.concatenate(lengths)] if amounts is None else lengths
    sources = [
        plan_packing(
            each, context.max_seq_len, dataset.packing_ratio, None if seed is None else (seed, number)
        )
        for number, each in enumerate(packed)
    ]
    drawn = [round(times * source.rows) for times, source in zip(often, sources, strict=True)]
    return RowOrder(sources, drawn, seed, varies=context.is_training)


def packing_lines(order: RowOrder, asked: float | Literal["auto"] | None, where: str) -> list[str]:
    """Describe the packing for the user, one line for each separately packed stream."""
    lines = []
    for one in order.streams:
        fits = (
            f" ({asked:g} do not fit)" if isinstance(asked, (int, float)) and one.ratio < 0.99 * asked else ""
        )
        lines.append(
            f"{where}: {counted(len(one.lengths), 'example')} in {counted(one.rows, 'row')} of "
            f"{counted(one.row_len, 'token')}: "
            f"{one.ratio:.1f} per row{fits}; {1 - one.fill:.1%} is padding."
        )
    return lines


class RowDataset(Dataset):
    """Reads the rows that the sampler picks, and saves and restores the position in an epoch.

    Args:
        stores: The examples of each source, by its key in the config.
        order: The packing and order of rows.
        sampler: The sampler that `load_state_dict` repositions.
        context: What the loader needs from the run.
    """

    def __init__(
        self,
        stores: Mapping[str, ExampleStore],
        order: RowOrder,
        sampler: RowSampler,
        context: LoaderContext,
    ) -> None:
        self.stores = list(stores.values())
        self.fingerprints = {where: store.fingerprint for where, store in stores.items()}
        self._takes_other_rows = context.takes_other_rows
        self.where = context.where
        self.order = order
        self._sampler = sampler
        self._firsts = np.cumsum([0, *map(len, self.stores)])
        plan = (order.seed, list(order.drawn), *((one.row_len, one.rows) for one in order.streams))
        lengths = hashlib.sha256(repr(plan).encode())
        for store in self.stores:
            lengths.update(store.lengths.tobytes())
        self._digest = lengths.hexdigest()

    def __len__(self) -> int:
        """Rows per epoch, over all ranks."""
        return len(self.order)

    def __getitem__(self, row: tuple[int, np.ndarray]) -> dict[str, Any]:
        """Read a row for `RowCollator`, with its examples in the order of the stores."""
        number, members = row
        streams = np.searchsorted(self._firsts, members, side="right") - 1
        found = [self._read(stream, members[streams == stream]) for stream in sorted(set(streams.tolist()))]
        parts = found[0] if len(found) == 1 else map(np.concatenate, zip(*found or [NOTHING], strict=True))
        return {**dict(zip(("input_ids", "trained", "lengths"), parts, strict=True)), "sample_id": number}

    def _read(self, stream: int, members: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Read examples of one store, concatenated: ids, trained and lengths."""
        indices, store = members - self._firsts[stream], self.stores[stream]
        return *store.join(indices), store.lengths[indices]

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Return the epoch, how many of its rows all ranks have read, and a hash of the rows."""
        return self._sampler.place(num_samples, self._digest)

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Resume at the state's position.

        Raises:
            DataError: The position is inside an epoch of other rows, and the run doesn't allow that.
        """
        if not self._sampler.resume_at(state or {}, self._digest, takes_other_rows=self._takes_other_rows):
            raise DataError(
                f"{self.where}: the checkpoint was saved inside an epoch of other rows: the examples, "
                "their mix, packing_ratio, max_seq_len or the seed changed since then. " + HOW_TO_CONTINUE
            )


def _check(stores: Iterable[ExampleStore], max_seq_len: int, where: str) -> None:
    for store in stores:
        if len(store) and store.lengths.max() > max_seq_len:
            raise DataError(
                f"{where}: {store.folder} has an example of {store.lengths.max()} tokens; max_seq_len is "
                f"{max_seq_len}. Set max_seq_len: {store.lengths.max()}, or prepare the examples again."
            )
        # The mean loss is undefined for a batch without a token in the loss.
        if not store.trained.all():
            raise DataError(
                f"{where}: example {store.trained.argmin()} of {store.folder} has no token in the loss. "
                f"Leave such examples out."
            )
