"""Decide which examples share a row, for a whole dataset, from the lengths of its examples.

A dataset is read in passes, and each pass packs it again: it shuffles the examples, cuts them into windows
and packs each window by best fit decreasing (https://doi.org/10.1137/0203025). So examples share a row with
different random examples in each pass, and rows are nearly as full as if everything were packed at once. All
passes have the same number of rows.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

# Examples in a window. A small dataset has smaller windows, so that there are several of them.
WINDOW = 512
SMALLEST_WINDOW = 64


class Bins(NamedTuple):
    """The rows of a pass: bin b has the examples `members[bounds[b]:bounds[b + 1]]`.

    Attributes:
        members: (examples,) int64, example numbers.
        bounds: (bins + 1,) int64.
    """

    members: np.ndarray
    bounds: np.ndarray


@dataclass(frozen=True, eq=False)
class Packing:
    """How a dataset is packed.

    Attributes:
        lengths: (examples,) int64, tokens in each example.
        row_len: Tokens per row.
        first: The rows of the first pass.
        seed: Seed of the passes. None means no shuffling, and all passes are the same.
    """

    lengths: np.ndarray
    row_len: int
    first: Bins
    seed: tuple[int, ...] | None

    @property
    def rows(self) -> int:
        """Rows per pass."""
        return len(self.first.bounds) - 1

    @property
    def ratio(self) -> float:
        """Average number of examples per row."""
        return len(self.lengths) / max(1, self.rows)

    @property
    def fill(self) -> float:
        """The fraction of the rows' tokens that is not padding."""
        return float(self.lengths.sum()) / max(1, self.rows * self.row_len)

    def bins(self, turn: int) -> Bins:
        """Return the rows of pass `turn`, counted from 0."""
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
    """Plan the packing: pack the first pass and fix the number of rows of all passes.

    Args:
        lengths: (examples,) integers from 1 to `row_len`.
        row_len: Tokens per row.
        ratio: Average number of examples per row, at least 1; fewer if they don't fit. `auto` packs as many
            as fit; None gives each example its own row. No example is dropped or cut.
        seed: Seed of the passes. None makes all passes the same.
    """
    lengths = np.asarray(lengths, np.int64)
    count = len(lengths)
    if count and not 1 <= lengths.min() <= lengths.max() <= row_len:
        raise ValueError(f"lengths are {lengths.min()} to {lengths.max()}, but rows have {row_len} tokens.")
    if ratio is None or ratio == 1 or not count:
        return Packing(lengths, row_len, Bins(np.arange(count), np.arange(count + 1)), seed)
    densest = _pack(lengths, row_len, None if seed is None else (*seed, 0, 1))
    rows = len(densest.bounds) - 1
    # Leave room for passes that need a few more rows.
    rows = max(rows + rows // 1000, 0 if ratio == "auto" else -int(-count // ratio))
    return Packing(lengths, row_len, _split(densest, min(rows, count)), seed)


def shuffled(count: int, *seed: int) -> np.ndarray:
    """Shuffle the numbers 0 to count - 1 by the seed, (count,) int64.

    Trailing zeros have no effect in a seed of at most four 32-bit words. This uses the generator's raw bits,
    which are the same in every version of numpy, unlike its shuffles.
    """
    # The low bits of each key are its number, so a plain sort of the keys, which is fast, is enough.
    numbers = np.uint64((1 << count.bit_length()) - 1)
    keys = np.random.PCG64(seed).random_raw(count) & ~numbers | np.arange(count, dtype=np.uint64)
    keys.sort()
    return (keys & numbers).astype(np.int64)


def _pack(lengths: np.ndarray, row_len: int, seed: tuple[int, ...] | None) -> Bins:
    """Pack as densely as possible. Each window's emptiest bin is repacked with the next window."""
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
    """Assign each length to the fullest bin with room for it. Returns (lengths,) int64."""
    bins: list[int] = []
    # Bins with room for the shortest length, sorted by room.
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
    """Split the bins with the most examples in half until there are `rows` bins."""
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
