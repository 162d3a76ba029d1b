from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from mptfoundry.data.examples.store import ExampleStore, why_damaged, write_examples
from mptfoundry.errors import DataError
from tests.fuzz import damaged_bytes, odd_values

EXAMPLES = (([5, 6, 7], [0, 1, 1]), ([9], [1]), ([300, 2], [1, 0]))


def store_in(folder: Path, vocab_size: int = 384) -> ExampleStore:
    with write_examples(folder, vocab_size=vocab_size) as writer:
        for ids, trained in EXAMPLES:
            writer.add(np.array(ids), np.array(trained, bool))
        writer.meta = {"dropped": 3}
    return ExampleStore(folder)


def contents(store: ExampleStore) -> list[tuple[list[int], list[int]]]:
    return [(ids.tolist(), trained.astype(int).tolist()) for ids, trained in store]


def test_a_store_gives_back_what_was_written(tmp_path: Path) -> None:
    store = store_in(tmp_path / "deep" / "store")
    assert contents(store) == list(EXAMPLES)
    assert store.meta == {"dropped": 3}
    assert store.lengths.tolist() == [3, 1, 2]
    ids, trained = store[2]
    assert (ids.dtype, trained.dtype, store.lengths.dtype) == (np.int64, bool, np.int64)
    assert contents(pickle.loads(pickle.dumps(store))) == list(EXAMPLES)


def test_a_first_token_is_never_predicted_and_does_not_count_as_learned(tmp_path: Path) -> None:
    assert store_in(tmp_path / "store").trained.tolist() == [2, 0, 0]


@pytest.mark.parametrize(("vocab_size", "bytes_of_an_id"), [(384, 2), (50432, 2), (70000, 4)])
def test_ids_take_as_little_room_as_the_vocabulary_allows(
    tmp_path: Path, vocab_size: int, bytes_of_an_id: int
) -> None:
    assert store_in(tmp_path / "store", vocab_size).ids.nbytes == 6 * bytes_of_an_id


def test_a_store_is_whole_or_absent(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), write_examples(tmp_path / "store", vocab_size=10) as writer:
        writer.add(np.array([1]), np.array([True]))
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_store_of_nothing_can_be_read(tmp_path: Path) -> None:
    with write_examples(tmp_path / "store", vocab_size=10):
        pass
    assert contents(ExampleStore(tmp_path / "store")) == []


@pytest.mark.parametrize(
    ("ids", "trained"), [([], []), ([1, 2], [True]), ([10], [True]), ([-1], [True]), ([[1]], [[True]])]
)
def test_what_is_no_example_is_refused(tmp_path: Path, ids: list[int], trained: list[bool]) -> None:
    with write_examples(tmp_path / "store", vocab_size=10) as writer, pytest.raises(ValueError):
        writer.add(np.array(ids, int), np.array(trained, bool))


def test_a_damaged_store_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: holds no whole examples .* Prepare them again"):
        ExampleStore(tmp_path / "nowhere")
    folder = store_in(tmp_path / "store").folder
    (folder / "ids.bin").write_bytes(b"123")
    with pytest.raises(DataError, match=r"ids.bin has 3 bytes, not 12"):
        ExampleStore(folder)
    (folder / "store.json").write_text(json.dumps({"version": 1}))
    with pytest.raises(DataError, match="its version is 1, not 2"):
        ExampleStore(folder)


def test_damaged_bytes_are_found_in_every_file(tmp_path: Path) -> None:
    folder = store_in(tmp_path / "store").folder
    assert why_damaged(folder) is None
    fingerprint = ExampleStore(folder).fingerprint
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        for what, changed in damaged_bytes(content, seed=len(content), count=40):
            file.write_bytes(changed)
            assert (why_damaged(folder) is None) == (changed == content), (file.name, what)
        file.write_bytes(content)
    content = json.loads((folder / "store.json").read_text())
    for what, changed in odd_values(content, seed=3, count=60):
        (folder / "store.json").write_text(json.dumps(changed))
        assert changed == content or why_damaged(folder), what
    (folder / "store.json").write_text(json.dumps(content))
    assert store_in(tmp_path / "again").fingerprint == fingerprint
    (folder / "ids.bin").unlink()
    assert why_damaged(folder) == "holds ids.bin, which is missing"


def test_a_place_that_cannot_be_written_to_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(DataError, match="can't be written"),
        write_examples(tmp_path / "file" / "x", vocab_size=9),
    ):
        pass
