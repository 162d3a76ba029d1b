"""Which examples share a row, planned for a whole data set from the examples' lengths.

A data set is read in passes, and each pass packs it again: its examples are shuffled, cut into windows, and
those of a window packed by best fit decreasing (https://doi.org/10.1137/0203025). So the company that an
example keeps is random and changes, and rows are filled nearly as well as if all were packed at once. All
passes have the same number of rows.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

# Examples that are packed together; of a small data set less, so that there are several windows to be in.
WINDOW = 512
SMALLEST_WINDOW = 64


class Bins(NamedTuple):
    """The rows of a pass: bin b holds the examples `members[bounds[b]:bounds[b + 1]]`.

    Attributes:
        members: (examples,) int64, the examples' numbers.
        bounds: (bins + 1,) int64.
    """

    members: np.ndarray
    bounds: np.ndarray


@dataclass(frozen=True, eq=False)
class Packing:
    """How a data set is packed.

    Attributes:
        lengths: (examples,) int64, tokens of each example.
        row_len: Tokens of a row.
        first: The first pass.
        seed: What the passes belong to; None: windows are cut without shuffling, and all passes are alike.
    """

    lengths: np.ndarray
    row_len: int
    first: Bins
    seed: tuple[int, ...] | None

    @property
    def rows(self) -> int:
        """Rows of a pass."""
        return len(self.first.bounds) - 1

    @property
    def ratio(self) -> float:
        """Examples in a row, on average."""
        return len(self.lengths) / max(1, self.rows)

    @property
    def fill(self) -> float:
        """The share of the rows' tokens that is not padding."""
        return float(self.lengths.sum()) / max(1, self.rows * self.row_len)

    def bins(self, turn: int) -> Bins:
        """The rows of a pass, counted from 0."""
        if turn == 0 or self.seed is None or self.rows == len(self.lengths):
            return self.first
        for attempt in (1, 2, 3, 4):
            bins = _pack(self.lengths, self.row_len, (*self.seed, turn, attempt))
            if len(bins.bounds) - 1 <= self.rows:
                return _split(bins, self.rows)
        return self.first


def plan_packing(
    lengths: np.ndarray, row_len: int, ratio: float | Literal["auto"] | None, seed: tuple[int, ...] | None
) -> Packing:
    """Settle how many rows the passes have.

    Args:
        lengths: (examples,) integers from 1 to `row_len`.
        row_len: Tokens of a row.
        ratio: Examples in a row, on average: `auto`, as many as fit; a number from 1 on, as many, or what
            fits if that is less; None: each example has a row of its own. No example is left out or cut.
        seed: What the passes belong to; None: they are all alike.
    """
    lengths = np.asarray(lengths, np.int64)
    count = len(lengths)
    if count and not 1 <= lengths.min() <= lengths.max() <= row_len:
        raise ValueError(f"lengths are {lengths.min()} to {lengths.max()}, but rows have {row_len} tokens.")
    if ratio is None or ratio == 1 or not count:
        return Packing(lengths, row_len, Bins(np.arange(count), np.arange(count + 1)), seed)
    densest = _pack(lengths, row_len, None if seed is None else (*seed, 0, 1))
    rows = len(densest.bounds) - 1
    # Another pass may need a few rows more.
    rows = max(rows + rows // 1000, 0 if ratio == "auto" else -int(-count // ratio))
    return Packing(lengths, row_len, _split(densest, min(rows, count)), seed)


def shuffled(count: int, *seed: int) -> np.ndarray:
    """The numbers 0 to count - 1 in an order that belongs to the seed, (count,) int64.

    Zeros at the end of a seed make no difference. Made of a generator's raw bits, which stay the same in all
    versions of numpy; its shuffles need not.
    """
    # The low bits of each key are its number, so that sorting the keys, which is fast, is enough.
    numbers = np.uint64((1 << count.bit_length()) - 1)
    keys = np.random.PCG64(seed).random_raw(count) & ~numbers | np.arange(count, dtype=np.uint64)
    keys.sort()
    return (keys & numbers).astype(np.int64)


def _pack(lengths: np.ndarray, row_len: int, seed: tuple[int, ...] | None) -> Bins:
    """The densest bins. The emptiest bin of a window is emptied into the next, or each would leave one."""
    count = len(lengths)
    order = np.arange(count) if seed is None else shuffled(count, *seed)
    window = min(WINDOW, max(SMALLEST_WINDOW, count // 8))
    members, sizes = [], []
    carried = order[:0]
    for start in range(0, count, window):
        some = np.concatenate([carried, order[start : start + window]])
        some = some[np.argsort(-lengths[some], kind="stable")]
        bins = _best_fit(lengths[some].tolist(), row_len)
        some, bins = some[np.argsort(bins, kind="stable")], np.sort(bins)
        if start + window < count:
            is_carried = bins == np.bincount(bins, lengths[some]).argmin()
            carried, some, bins = some[is_carried], some[~is_carried], bins[~is_carried]
        members.append(some)
        sizes.append(np.unique(bins, return_counts=True)[1])
    return Bins(np.concatenate(members), np.concatenate([[0], *sizes]).cumsum())


def _best_fit(falling: list[int], row_len: int) -> np.ndarray:
    """Each length's bin, (lengths,) int64: of those that have room for it the one with the least."""
    bins: list[int] = []
    # Bins that have room for the shortest, by their room.
    rooms: list[int] = []
    owners: list[int] = []
    made = 0
    for length in falling:
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room, number = rooms.pop(at) - length, owners.pop(at)
        else:
            room, number = row_len - length, made
            made += 1
        bins.append(number)
        if room >= falling[-1]:
            at = bisect_left(rooms, room)
            rooms.insert(at, room)
            owners.insert(at, number)
    return np.array(bins)


def _split(bins: Bins, rows: int) -> Bins:
    """Halve the bins of the most examples until there are `rows`."""
    sizes = np.diff(bins.bounds)
    largest = [(-size, start) for size, start in zip(sizes.tolist(), bins.bounds.tolist(), strict=False)]
    heapq.heapify(largest)
    cuts = []
    for _ in range(rows - len(sizes)):
        size, start = -largest[0][0], largest[0][1]
        cuts.append(start + size // 2)
        heapq.heapreplace(largest, (-(size // 2), start))
        heapq.heappush(largest, (size // 2 - size, cuts[-1]))
    return Bins(bins.members, np.sort(np.concatenate([bins.bounds, np.array(cuts, np.int64)])))
