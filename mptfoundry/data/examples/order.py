"""Decide which rows an epoch has, in which order, and which rank reads which row.

The seed determines the order of an epoch. Ranks take rows in turns, so a global batch has the same rows for
any number of ranks, and a run can resume at any row without reading the ones before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from torch.utils.data import DistributedSampler

from mptfoundry.data.examples.packing import Packing, shuffled


@dataclass(frozen=True, eq=False)
class EpochRows:
    """The rows of an epoch in order: `rows[i]` is the row's index and its examples' indices.

    Attributes:
        numbers: (rows,) int64; a row that repeats within an epoch keeps its number.
        starts: (rows,) int64, where each row's examples start in `members`.
        stops: (rows,) int64, where they end.
        members: int64, example numbers, counted across all streams.
    """

    numbers: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    members: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> tuple[int, np.ndarray]:
        return int(self.numbers[place]), self.members[self.starts[place] : self.stops[place]]


@dataclass(frozen=True, eq=False)
class RowOrder:
    """The rows of all epochs.

    A stream is read in passes: every row comes once before any row repeats, even across epochs.

    Attributes:
        streams: The packing of each stream.
        drawn: Rows per epoch from each stream.
        seed: Seed of the order. None reads the streams one after the other without shuffling.
        varies: Whether epochs differ. If False, every epoch is the same as the first.
    """

    streams: Sequence[Packing]
    drawn: Sequence[int]
    seed: int | None
    varies: bool = True

    def __len__(self) -> int:
        return sum(self.drawn)

    def epoch(self, number: int) -> EpochRows:
        """Return the rows of epoch `number`, counted from 0."""
        number = number if self.varies else 0
        parts: list[tuple[np.ndarray, ...]] = []
        first_row = first_example = first_member = 0
        for stream, (packing, drawn) in enumerate(zip(self.streams, self.drawn, strict=True)):
            place, end = number * drawn, (number + 1) * drawn
            while place < end:
                turn, begin = divmod(place, packing.rows)
                rows = self._turn(stream, turn)[begin : begin + end - place]
                members, bounds = packing.bins(turn)
                starts, stops = first_member + bounds[rows], first_member + bounds[rows + 1]
                parts.append((first_row + rows, starts, stops, first_example + members))
                first_member += len(members)
                place += len(rows)
            first_row += packing.rows
            first_example += len(packing.lengths)
        numbers, starts, stops, members = (np.concatenate(part) for part in zip(*parts, strict=True))
        if self.seed is not None and len(self.streams) > 1:
            mixed = shuffled(len(numbers), self.seed, len(self.streams), number)
            numbers, starts, stops = numbers[mixed], starts[mixed], stops[mixed]
        return EpochRows(numbers, starts, stops, members)

    def _turn(self, stream: int, turn: int) -> np.ndarray:
        """Return the order of a stream's rows in pass `turn`, (rows,) int64."""
        rows = self.streams[stream].rows
        return np.arange(rows) if self.seed is None else shuffled(rows, self.seed, stream, turn)


def passes(
    sizes: Sequence[int], amounts: Sequence[float], by: Literal["proportion", "repeat", "choose"]
) -> list[float]:
    """Compute how many times an epoch reads each stream's examples, on average.

    Args:
        sizes: Number of examples in each stream, at least one.
        amounts: One per stream. `proportion`: the stream's weight in an epoch with as many examples as all
            streams together; weights need not sum to 1. `repeat`: times per epoch. `choose`: examples per
            epoch.
        by: The meaning of the amounts.
    """
    if by == "repeat":
        return list(amounts)
    whole = sum(sizes) / sum(amounts) if by == "proportion" else 1
    return [amount * whole / size for amount, size in zip(amounts, sizes, strict=True)]


class Order(Protocol):
    """The rows of all epochs, in any form that can be indexed."""

    def __len__(self) -> int:
        """Rows in an epoch."""

    def epoch(self, number: int) -> Any:
        """The rows of epoch `number`, counted from 0."""


# An empty row, for a rank that has no rows left: its number, and no examples.
EMPTY_ROW = (-1, np.empty(0, np.int64))


# Advice for a checkpoint that was saved inside an epoch of other rows.
HOW_TO_CONTINUE = (
    "Undo the change, name the changed keys in allow_changes, or start a new run from the checkpoint's "
    "weights with load_path and load_weights_only: true."
)


class RowSampler(DistributedSampler):
    """Gives each rank its rows of an epoch: rank r of n reads the rows r, r + n, r + 2n, ...

    Composer sets the epoch. `resume` sets where a resumed run starts in its first epoch.

    Args:
        order: The rows of all epochs.
        rank: This process's rank.
        ranks: Number of ranks.
        drop_last: Whether to drop up to `ranks` - 1 rows so that every rank gets the same number. If False,
            ranks that would get one row less get an empty row.
    """

    def __init__(self, order: Order, *, rank: int, ranks: int, drop_last: bool) -> None:
        super().__init__(range(len(order)), ranks, rank, shuffle=False, drop_last=drop_last)  # type: ignore[arg-type]
        # If total_size is larger, Composer treats the excess as repeated rows and cuts it from an evaluation.
        self.total_size = len(order)
        self.order = order
        self._resumed = (-1, 0)

    def resume(self, epoch: int, place: int) -> None:
        """Start `epoch` at row `place`, counted over all ranks."""
        self._resumed = (epoch, place)

    def place(self, num_samples: int, rows_of: str) -> dict[str, Any]:
        """A position to save: the epoch, how many of its rows all ranks have read, and a hash of the rows."""
        return {"epoch": self.epoch, "row": num_samples, "rows_of": rows_of}

    def resume_at(self, place: Mapping[str, Any], rows_of: str, *, takes_other_rows: bool) -> bool:
        """Resume at a position; return False if it is inside an epoch of other rows that aren't allowed."""
        if place.get("row") == 0:
            return True
        is_taken = place.get("rows_of") == rows_of or (takes_other_rows and "row" in place)
        if is_taken:
            self.resume(int(place["epoch"]), int(place["row"]))
        return is_taken

    def __len__(self) -> int:
        """Rows of this rank in a full epoch."""
        return self.num_samples

    def __iter__(self) -> Iterator[Any]:
        epoch, place = self._resumed
        first = place if self.epoch == epoch else 0
        rows = self.order.epoch(self.epoch)
        left, ranks = len(rows) - first, self.num_replicas
        for step in range(left // ranks if self.drop_last else -(-left // ranks)):
            place = first + step * ranks + self.rank
            yield rows[place] if place < len(rows) else EMPTY_ROW
