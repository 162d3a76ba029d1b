"""Which rows an epoch has, in which order, and which rank reads which of them.

The order of an epoch belongs to the seed. Ranks take its rows in turns, so that a global batch holds the same
rows whatever the number of ranks, and a resumed run continues at any row without reading those before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch.utils.data import DistributedSampler

from mptfoundry.data.examples.packing import Packing, shuffled


@dataclass(frozen=True, eq=False)
class EpochRows:
    """The rows of an epoch in their order: `rows[i]` is the row's number and its examples' numbers.

    Attributes:
        numbers: (rows,) int64; a row that comes again in an epoch has the same number.
        starts: (rows,) int64, where a row's examples begin in `members`.
        stops: (rows,) int64, where they end.
        members: int64, numbers of examples, counted through all streams.
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

    A stream is read in passes: each row comes once before any comes again, from one epoch to the next too.

    Attributes:
        streams: How each stream is packed.
        drawn: How many rows of each stream an epoch has.
        seed: What the order belongs to; None: as the streams have it, one after the other.
        varies: Epochs differ; otherwise each is as the first.
    """

    streams: Sequence[Packing]
    drawn: Sequence[int]
    seed: int | None
    varies: bool = True

    def __len__(self) -> int:
        return sum(self.drawn)

    def epoch(self, number: int) -> EpochRows:
        """The rows of an epoch, counted from 0."""
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
        """The rows of a stream in the order of a pass, (rows,) int64."""
        rows = self.streams[stream].rows
        return np.arange(rows) if self.seed is None else shuffled(rows, self.seed, stream, turn)


def passes(
    sizes: Sequence[int], amounts: Sequence[float], by: Literal["proportion", "repeat", "choose"]
) -> list[float]:
    """How often an epoch reads each stream's examples, on average.

    Args:
        sizes: Examples of each stream, at least one.
        amounts: For each stream, by `proportion`: its share of an epoch that has as many examples as all
            streams together, relative to the sum of the shares; `repeat`: how often; `choose`: examples.
        by: What the amounts are.
    """
    if by == "repeat":
        return list(amounts)
    whole = sum(sizes) / sum(amounts) if by == "proportion" else 1
    return [amount * whole / size for amount, size in zip(amounts, sizes, strict=True)]


# An empty row, for a rank that has none left: its number, and no examples.
EMPTY_ROW = (-1, np.empty(0, np.int64))


class RowSampler(DistributedSampler):
    """Gives each rank its rows of an epoch: rank r of n reads the rows r, r + n, r + 2n, ...

    Composer sets the epoch. A resumed run's first epoch begins where `resume` says.

    Args:
        order: The rows of all epochs.
        rank: This process's number among `ranks`.
        ranks: How many processes there are.
        drop_last: Every rank gets the same number of rows, and up to `ranks` - 1 rows are left out. Otherwise
            ranks that would get one row less get an empty one.
    """

    def __init__(self, order: RowOrder, *, rank: int, ranks: int, drop_last: bool) -> None:
        super().__init__(range(len(order)), ranks, rank, shuffle=False, drop_last=drop_last)  # type: ignore[arg-type]
        # Composer takes what is more than the rows for repeated ones, which it would cut off an evaluation.
        self.total_size = len(order)
        self.order = order
        self._resumed = (-1, 0)

    def resume(self, epoch: int, place: int) -> None:
        """Begin `epoch` at `place` of its rows, of all ranks together."""
        self._resumed = (epoch, place)

    def __len__(self) -> int:
        """Rows of this rank in a whole epoch."""
        return self.num_samples

    def __iter__(self) -> Iterator[Any]:
        epoch, place = self._resumed
        first = place if self.epoch == epoch else 0
        rows = self.order.epoch(self.epoch)
        left, ranks = len(rows) - first, self.num_replicas
        for step in range(left // ranks if self.drop_last else -(-left // ranks)):
            place = first + step * ranks + self.rank
            yield rows[place] if place < len(rows) else EMPTY_ROW
