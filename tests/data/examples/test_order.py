from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mptfoundry.data.examples.order import EMPTY_ROW, RowOrder, RowSampler, passes
from mptfoundry.data.examples.packing import plan_packing


def order_of(
    *sizes: int, drawn: list[int] | None = None, seed: int | None = 3, packed: bool = True
) -> RowOrder:
    """Streams of examples of 1 to 8 tokens in rows of 16."""
    draw = np.random.default_rng(0)
    streams = [
        plan_packing(draw.integers(1, 9, size), 16, "auto" if packed else None, seed and (seed, stream))
        for stream, size in enumerate(sizes)
    ]
    return RowOrder(streams, drawn or [one.rows for one in streams], seed)


def examples_in(order: RowOrder, epoch: int) -> list[int]:
    return [int(example) for _, members in order.epoch(epoch) for example in members]


def test_an_epoch_has_each_row_and_each_example_once() -> None:
    order = order_of(60, 25)
    for epoch in range(3):
        rows = order.epoch(epoch)
        assert len(rows) == len(order)
        assert sorted(rows.numbers.tolist()) == list(range(len(order)))
        assert sorted(examples_in(order, epoch)) == list(range(85))


def test_epochs_differ_and_each_belongs_to_its_seed() -> None:
    order = order_of(60)
    assert examples_in(order, 1) == examples_in(order_of(60), 1)
    assert len({tuple(examples_in(order, epoch)) for epoch in range(4)}) == 4
    assert examples_in(order, 1) != examples_in(order_of(60, seed=4), 1)


def test_without_a_seed_rows_come_as_they_are_in_every_epoch() -> None:
    order = order_of(20, 10, seed=None, packed=False)
    assert examples_in(order, 0) == examples_in(order, 5) == list(range(30))


def test_an_order_that_does_not_vary_is_always_the_first() -> None:
    varying = order_of(30)
    fixed = RowOrder(varying.streams, varying.drawn, varying.seed, varies=False)
    assert examples_in(fixed, 7) == examples_in(varying, 0)


def test_a_stream_is_read_in_passes_across_epochs() -> None:
    order = order_of(40, 40, drawn=[7, 100], packed=False)
    epochs = [examples_in(order, epoch) for epoch in range(6)]
    assert all(sum(example < 40 for example in epoch) == 7 for epoch in epochs)
    counts = Counter(example for epoch in epochs for example in epoch)
    # 42 and 600 draws of 40 examples each.
    assert sorted(counts[example] for example in range(40)) == [1] * 38 + [2] * 2
    assert {counts[example] for example in range(40, 80)} == {15}


@pytest.mark.parametrize(
    ("by", "amounts", "expected"),
    [("proportion", [3, 1], [1.5, 0.5]), ("repeat", [2, 0.5], [2, 0.5]), ("choose", [50, 400], [0.5, 4])],
)
def test_passes_are_what_the_amounts_say(by: str, amounts: list[float], expected: list[float]) -> None:
    assert passes([100, 100], amounts, by) == expected  # type: ignore[arg-type]


def test_proportions_are_shares_of_examples_whatever_the_sizes() -> None:
    often = passes([900, 100], [0.5, 0.5], "proportion")
    assert [900 * often[0], 100 * often[1]] == [500, 500]


class Numbers:
    """An order whose rows are numbers."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def epoch(self, number: int) -> list[int]:
        return [100 * number + row for row in range(self.rows)]


def read(
    ranks: int, rows: int = 23, first: int = 0, drop_last: bool = False, epoch: int = 0
) -> list[list[int]]:
    """What each rank reads; -1 is an empty row."""
    hands = []
    for rank in range(ranks):
        sampler = RowSampler(Numbers(rows), rank=rank, ranks=ranks, drop_last=drop_last)  # type: ignore[arg-type]
        sampler.resume(0, first)
        sampler.set_epoch(epoch)
        hands.append([-1 if row is EMPTY_ROW else row for row in sampler])
        if not first:
            assert len(sampler) == len(hands[-1])
    return hands


def global_batches(hands: list[list[int]], size: int) -> list[set[int]]:
    mine = size // len(hands)
    starts = range(0, len(hands[0]), mine)
    return [{row for hand in hands for row in hand[i : i + mine]} - {-1} for i in starts]


@pytest.mark.parametrize("first", [0, 8])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_global_batch_has_the_same_rows_whatever_the_ranks(ranks: int, first: int) -> None:
    expected = global_batches(read(1, first=first), 8)
    assert expected == global_batches(read(ranks, first=first), 8)
    assert sorted(set().union(*expected)) == list(range(first, 23))


def test_ranks_get_the_same_number_of_rows() -> None:
    assert read(4, rows=6) == [[0, 4], [1, 5], [2, -1], [3, -1]]
    assert read(4, rows=6, drop_last=True) == [[0], [1], [2], [3]]


def test_only_the_resumed_epoch_begins_in_its_middle() -> None:
    assert read(1, rows=5, first=3) == [[3, 4]]
    assert read(1, rows=5, first=3, epoch=1) == [[100, 101, 102, 103, 104]]
    assert read(2, rows=5, first=5) == [[], []]


def test_composer_cuts_nothing_off_an_evaluation() -> None:
    sampler = RowSampler(Numbers(5), rank=0, ranks=2, drop_last=False)  # type: ignore[arg-type]
    assert sampler.total_size - len(sampler.dataset) == 0
