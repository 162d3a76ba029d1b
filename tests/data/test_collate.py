from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from composer.core.data_spec import default_split_batch

from mptfoundry.data.collate import (
    RowCollator,
    TextCollator,
    count_rows,
    count_samples,
    count_tokens,
    sequence_ids,
)


def sample(number: int, *ids: int) -> dict[str, object]:
    return {"input_ids": np.array(ids, np.int64), "sample_id": number}


def test_full_samples_need_no_mask() -> None:
    batch = TextCollator(3)([sample(7, 5, 6, 0), sample(2, 0, 0, 9)])
    assert set(batch) == {"input_ids", "labels", "sample_id"}
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[5, 6, 0], [0, 0, 9]]
    assert batch["sample_id"].tolist() == [7, 2]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert count_tokens(batch) == {"total": 6, "loss_generating": 4}
    assert count_samples(batch) == 2


def test_labels_are_masked_by_place_and_never_by_id() -> None:
    batch = TextCollator(4, pad_token_id=0)([sample(0, 0, 5, 0), sample(1, 7, 0, 0, 0)])
    assert batch["input_ids"].tolist() == [[0, 5, 0, 0], [7, 0, 0, 0]]
    assert batch["labels"].tolist() == [[0, 5, 0, -100], [7, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[True, True, True, False], [True] * 4]
    assert batch["max_documents"] == 1
    assert count_tokens(batch) == {"total": 7, "loss_generating": 5}


def test_a_sample_of_one_token_has_nothing_to_learn() -> None:
    batch = TextCollator(3)([sample(0, 4)])
    assert count_tokens(batch) == {"total": 1, "loss_generating": 0}


@pytest.mark.parametrize("lengths", [(5, 5), (5, 2), (1, 3)])
def test_loss_generating_tokens_are_the_shifted_labels(lengths: tuple[int, ...]) -> None:
    samples = [sample(number, *range(length)) for number, length in enumerate(lengths)]
    batch = TextCollator(5)(samples)
    assert count_tokens(batch)["loss_generating"] == int((batch["labels"][:, 1:] != -100).sum())


def test_an_eos_belongs_to_the_document_that_it_ends() -> None:
    ids = torch.tensor([[4, 5, 0, 6, 0, 0, 7], [0, 1, 2, 3, 4, 5, 0]])
    assert sequence_ids(ids, eos_token_id=0).tolist() == [[0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]


def test_a_bos_belongs_to_the_document_that_it_starts() -> None:
    ids = torch.tensor([[4, 5, 0, 6, 0, 0, 7], [0, 1, 2, 3, 4, 5, 6]])
    assert sequence_ids(ids, bos_token_id=0).tolist() == [[0, 0, 1, 1, 2, 3, 3], [1, 1, 1, 1, 1, 1, 1]]


def test_the_collator_numbers_documents_if_asked() -> None:
    batch = TextCollator(4, eos_token_id=9)([sample(0, 1, 9, 2, 3)])
    assert batch["sequence_id"].tolist() == [[0, 0, 1, 1]]
    assert batch["sequence_id"].dtype == torch.int64
    assert batch["max_documents"] == 2


def test_the_documents_of_the_fullest_row_are_counted_without_its_padding() -> None:
    rows = [sample(0, 1, 9, 2), sample(1, 9, 9, 3, 4), sample(2, 9)]
    batch = TextCollator(6, pad_token_id=9, eos_token_id=9)(rows)
    assert batch["sequence_id"].tolist() == [[0, 0, 1, 1, 2, 3], [0, 1, 2, 2, 2, 3], [0, 1, 2, 3, 4, 5]]
    assert batch["max_documents"] == 3
    assert TextCollator(4, bos_token_id=9)([sample(0, 9, 5, 9, 9)])["max_documents"] == 3


def test_composer_splits_a_batch_and_leaves_the_number_of_documents_alone() -> None:
    batch = TextCollator(4, eos_token_id=9)([sample(n, 1, 9, 2, 3) for n in range(5)])
    pieces = default_split_batch(batch, 2)
    assert [len(piece["input_ids"]) for piece in pieces] == [2, 2, 1]
    assert [piece["max_documents"] for piece in pieces] == [2, 2, 2]
    assert next(iter(batch)) == "input_ids"  # streaming counts the samples of a batch by its first value


def row(number: int, *examples: tuple[list[int], list[int]]) -> dict[str, Any]:
    return {
        "input_ids": np.array([token for ids, _ in examples for token in ids], np.int64),
        "trained": np.array([one for _, trained in examples for one in trained], bool),
        "lengths": np.array([len(ids) for ids, _ in examples], np.int64),
        "sample_id": number,
    }


def test_examples_of_a_row_lie_end_to_end_and_no_first_token_is_learned() -> None:
    rows = [row(4, ([5, 6], [1, 1]), ([7, 8, 9], [1, 0, 1])), row(2, ([1, 2, 3, 4], [0, 1, 1, 1]))]
    batch = RowCollator(6, pad_token_id=9)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 9], [1, 2, 3, 4, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 6, -100, -100, 9, -100], [-100, 2, 3, 4, -100, -100]]
    assert batch["attention_mask"].tolist() == [[True] * 5 + [False], [True] * 4 + [False] * 2]
    assert batch["sequence_id"].tolist() == [[0, 0, 1, 1, 1, 1], [0] * 6]
    assert (batch["sample_id"].tolist(), batch["max_documents"]) == ([4, 2], 2)
    assert (count_tokens(batch), count_rows(batch)) == ({"total": 9, "loss_generating": 5}, 2)
    assert rows[0]["trained"].tolist() == [True, True, True, False, True]


def test_full_rows_of_one_example_need_no_mask_and_count_what_is_learned() -> None:
    batch = RowCollator(3)([row(0, ([5, 6, 7], [1, 0, 1]))])
    assert not {"attention_mask", "sequence_id"} & set(batch)
    assert count_tokens(batch) == {"total": 3, "loss_generating": 1}


@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (8, 8), (9, 16), (17, 20)])
def test_padding_is_trimmed_to_a_multiple_of_eight(tokens: int, width: int) -> None:
    rows = [row(0, ([1] * tokens, [1] * tokens)), row(1, ([1], [1]))]
    batch = RowCollator(20, trims_padding=True)(rows)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, width)
    assert RowCollator(20)(rows)["input_ids"].shape == (2, 20)


def test_a_row_that_stands_for_none_counts_as_none() -> None:
    batch = RowCollator(4)([row(-1), row(3, ([1, 2], [0, 1]))])
    assert batch["attention_mask"].tolist() == [[True, False, False, False], [True, True, False, False]]
    assert (count_tokens(batch), count_rows(batch)) == ({"total": 2, "loss_generating": 1}, 1)


def test_composer_splits_rows_and_their_counts_alike() -> None:
    rows = [row(number, ([1] * number, [1] * number), ([2, 3], [1, 1])) for number in range(1, 6)]
    pieces = default_split_batch(RowCollator(16)(rows), 2)
    assert [count_rows(piece) for piece in pieces] == [2, 2, 1]
    for piece in pieces:
        trained = int((piece["labels"][:, 1:] != -100).sum())
        assert count_tokens(piece) == {
            "total": int(piece["attention_mask"].sum()),
            "loss_generating": trained,
        }


def test_rows_of_65536_tokens_are_made() -> None:
    rows = [row(0, *[(list(range(128)), [1] * 128)] * 511)]
    batch = RowCollator(65536)(rows)
    assert batch["sequence_id"].shape == (1, 65536) and batch["max_documents"] == 511
    assert count_tokens(batch) == {"total": 65408, "loss_generating": 511 * 127}
