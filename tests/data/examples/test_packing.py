from __future__ import annotations

import time

import numpy as np
import pytest

from mptfoundry.data.examples.packing import Bins, Packing, plan_packing, shuffled


def lengths_like(kind: str, count: int, row_len: int) -> np.ndarray:
    draw = np.random.default_rng(0)
    if kind == "all lengths alike":
        return draw.integers(1, row_len + 1, count)
    return np.clip(draw.lognormal(np.log(row_len / 10), 1, count).astype(int), 1, row_len)


def loads(packing: Packing, bins: Bins) -> np.ndarray:
    return np.add.reduceat(packing.lengths[bins.members], bins.bounds[:-1])


def company(bins: Bins) -> set[tuple[int, int]]:
    """All pairs of examples that share a row."""
    rows = np.split(bins.members, bins.bounds[1:-1])
    return {(a, b) for row in rows for a in row.tolist() for b in row.tolist() if a < b}


@pytest.mark.parametrize("ratio", ["auto", 1, 1.5, 3, 400, None])
@pytest.mark.parametrize("kind", ["all lengths alike", "mostly short"])
@pytest.mark.parametrize("seed", [(3, 1), None])
def test_a_pass_has_each_example_once_and_no_row_is_overfull(
    kind: str, ratio: float | None, seed: tuple[int, ...] | None
) -> None:
    packing = plan_packing(lengths_like(kind, 1500, 64), 64, ratio, seed)
    for turn in range(5):
        bins = packing.bins(turn)
        assert sorted(bins.members.tolist()) == list(range(1500))
        assert len(bins.bounds) == packing.rows + 1 and (np.diff(bins.bounds) > 0).all()
        assert loads(packing, bins).max() <= 64


def test_four_examples_by_hand() -> None:
    packing = plan_packing(np.array([3, 7, 5, 5]), 10, "auto", None)
    members, bounds = packing.bins(0)
    assert (members.tolist(), bounds.tolist()) == ([1, 0, 2, 3], [0, 2, 4])
    assert (packing.rows, packing.ratio, packing.fill) == (2, 2.0, 1.0)


def test_a_length_goes_where_it_leaves_the_least_room() -> None:
    members, bounds = plan_packing(np.array([60, 4, 55, 41]), 100, "auto", None).bins(0)
    # First fit would put the 4 beside the 60.
    assert [part.tolist() for part in np.split(members, bounds[1:-1])] == [[0], [2, 3, 1]]


@pytest.mark.parametrize(("kind", "least"), [("all lengths alike", 0.97), ("mostly short", 0.995)])
def test_rows_are_nearly_full(kind: str, least: float) -> None:
    assert plan_packing(lengths_like(kind, 20_000, 2048), 2048, "auto", (1,)).fill > least


def test_a_number_is_met_exactly() -> None:
    lengths = lengths_like("mostly short", 3000, 256)
    packing = plan_packing(lengths, 256, 4, (1,))
    assert plan_packing(lengths, 256, "auto", (1,)).ratio > 4
    assert (packing.rows, packing.ratio) == (750, 4)
    assert plan_packing(lengths, 256, 1.01, (1,)).rows == 2971


def test_a_number_that_does_not_fit_gives_what_fits() -> None:
    lengths = lengths_like("all lengths alike", 300, 64)
    densest = plan_packing(lengths, 64, "auto", (1,))
    assert densest.ratio < 5
    assert plan_packing(lengths, 64, 5, (1,)).rows == densest.rows


def test_examples_change_company_from_pass_to_pass_and_each_belongs_to_its_seed() -> None:
    lengths = lengths_like("mostly short", 5000, 512)
    packing = plan_packing(lengths, 512, "auto", (7,))
    first, second = company(packing.bins(0)), company(packing.bins(1))
    assert len(first & second) < 0.05 * len(first)
    assert company(packing.bins(1)) == second == company(plan_packing(lengths, 512, "auto", (7,)).bins(1))
    assert company(plan_packing(lengths, 512, "auto", (8,)).bins(1)) != second


def test_without_a_seed_all_passes_are_alike() -> None:
    packing = plan_packing(lengths_like("mostly short", 5000, 512), 512, "auto", None)
    assert all(np.array_equal(*pair) for pair in zip(packing.bins(0), packing.bins(3), strict=True))


def test_examples_alone_stay_where_they_are() -> None:
    members, bounds = plan_packing(np.array([3, 9, 1]), 10, None, (1, 2)).bins(0)
    assert (members.tolist(), bounds.tolist()) == ([0, 1, 2], [0, 1, 2, 3])


def test_nothing_can_be_packed() -> None:
    packing = plan_packing(np.empty(0, int), 10, "auto", (1,))
    assert (packing.rows, packing.ratio, packing.fill, packing.bins(0).members.tolist()) == (0, 0, 0, [])


@pytest.mark.parametrize("lengths", [[5, 11], [0, 5]])
def test_what_fits_no_row_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="rows have 10 tokens"):
        plan_packing(np.array(lengths), 10, "auto", None)


def test_a_million_examples_take_seconds() -> None:
    lengths = lengths_like("mostly short", 1_000_000, 2048)
    started_at = time.process_time()
    plan_packing(lengths, 2048, "auto", (1,))
    assert time.process_time() - started_at < 5


def test_an_order_belongs_to_its_seed_for_good() -> None:
    assert shuffled(10, 17, 0).tolist() == [9, 1, 4, 3, 5, 6, 2, 7, 8, 0]
    assert shuffled(10, 17, 1).tolist() == [9, 1, 8, 5, 4, 7, 0, 6, 2, 3]
    firsts = np.bincount([shuffled(5, seed)[0] for seed in range(2000)])
    # Five standard deviations of a fair draw.
    assert abs(firsts - 400).max() < 5 * np.sqrt(2000 * 0.2 * 0.8)
