"""What may happen to shards, and what a run says of it; each in the training process and in workers."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import MDSWriter

from mptfoundry.errors import DataError
from tests.loaders import text_loader

pytestmark = pytest.mark.long

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    (
        "the same in place, in a copy, in a store; a full disk",
        "more than 20, in one process",
        "an error names it; a copy is downloaded again first",
    ),
    ("an epoch loses samples", "some are dropped", "an error with both numbers"),
]

SHARD = "shard.00002.mds"
Build = Callable[..., Any]
SmallFiles = Callable[[int], AbstractContextManager[None]]


@pytest.fixture
def build(tiny_tokenizer: Any) -> Iterator[Build]:
    built: list[Any] = []

    def call(**options: Any) -> Any:
        settings = {"tokenizer": tiny_tokenizer, "max_seq_len": 64, "vocab_size": 320, "device_batch_size": 4}
        settings |= {"split": "train", "drop_last": False, "download_retry": 1}
        built.append(text_loader(**{**settings, **options}).dataloader)
        return built[-1]

    yield call
    for loader in built:
        # Left to the garbage collector, workers take seconds to end.
        if loader._iterator is not None:
            loader._iterator._shutdown_workers()


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        return Path(shutil.copytree(prepared, tmp_path / name))

    return make


def read(loader: Any) -> list[int]:
    """The numbers of an epoch's samples."""
    return [int(number) for batch in loader for number in batch["sample_id"]]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-4] ^= 1  # of the low byte of an id, which stays one of the 320
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def remove(path: Path) -> None:
    path.unlink()


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (flip_a_bit, "is damaged: its xxh64 is not what its index says"),
        (cut_short, r"has [\d,]+ bytes, and its index says [\d,]+"),
        (grow, r"has [\d,]+ bytes, and its index says [\d,]+"),
        (remove, "is missing"),
    ],
)
def test_a_bad_shard_of_a_folder_ends_the_run_with_its_name(
    build: Build, copy: Callable[[str], Path], fault: Callable[[Path], None], problem: str, workers: int
) -> None:
    folder = copy("data")
    fault(folder / "train" / SHARD)
    message = (
        rf"^train_loader\.dataset(\.streams\.code)?: /\S+/{SHARD} {problem}\. Copy or prepare them again\.$"
    )
    with pytest.raises(DataError, match=message):
        read(build(streams={"code": {"local": str(folder)}}, num_workers=workers))
    assert (folder / "train" / "shard.00001.mds").is_file()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_is_removed_while_a_run_reads_is_named(
    build: Build, copy: Callable[[str], Path], workers: int
) -> None:
    folder = copy("data")
    loader = build(local=str(folder), num_workers=workers, prefetch_factor=1, predownload=8)
    batches = iter(loader)
    next(batches)
    (folder / "train" / "shard.00004.mds").unlink()
    with pytest.raises(DataError, match=r"shard\.00004\.mds is missing\."):
        list(batches)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (
            flip_a_bit,
            r"is damaged: its xxh64 is not what its index says, also when fetched again\. Fix it",
        ),
        (
            cut_short,
            r"has [\d,]+ bytes, and its index says [\d,]+, also when fetched again\. Fix it",
        ),
        (remove, r"can't be fetched: No such file or directory\.$"),
    ],
)
def test_a_bad_shard_of_a_remote_ends_the_run_with_its_name(
    build: Build,
    copy: Callable[[str], Path],
    tmp_path: Path,
    fault: Callable[[Path], None],
    problem: str,
    workers: int,
) -> None:
    remote, local = copy("remote"), tmp_path / "local"
    fault(remote / "train" / SHARD)
    loader = build(remote=str(remote), local=str(local), num_workers=workers)
    with pytest.raises(DataError, match=rf"^train_loader\.dataset: {remote}/train/{SHARD} {problem}"):
        read(loader)
    assert not (local / "train" / SHARD).exists()


@pytest.mark.parametrize(
    ("verify", "fault", "workers"),
    [
        ("lazy", flip_a_bit, 0),
        ("lazy", cut_short, 2),
        *(
            pytest.param(*each, marks=pytest.mark.soak)
            for each in [("lazy", cut_short, 0), ("full", flip_a_bit, 0), ("full", cut_short, 0)]
        ),
        *(
            pytest.param(*each, 2, marks=pytest.mark.soak)
            for each in [("lazy", flip_a_bit), ("full", flip_a_bit), ("full", cut_short)]
        ),
    ],
)
def test_a_bad_copy_is_fetched_again(
    build: Build,
    copy: Callable[[str], Path],
    prepared: Path,
    fault: Callable[[Path], None],
    workers: int,
    verify: str,
) -> None:
    remote, local = copy("remote"), copy("local")
    fault(local / "train" / SHARD)
    loader = build(remote=str(remote), local=str(local), num_workers=workers, verify=verify)
    assert read(loader) == read(build(local=str(prepared), num_workers=workers))
    assert (local / "train" / SHARD).read_bytes() == (prepared / "train" / SHARD).read_bytes()


def test_a_copy_that_is_just_being_written_is_waited_for(
    build: Build,
    copy: Callable[[str], Path],
    prepared: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A busy machine may keep this writer from writing for longer than a run would wait.
    monkeypatch.setattr("mptfoundry.data.shards.integrity.STILL_WRITTEN_SECONDS", 60.0)
    remote, local = copy("remote"), copy("local")
    whole = (local / "train" / SHARD).read_bytes()
    (local / "train" / SHARD).write_bytes(whole[:100])

    def go_on() -> None:
        with (local / "train" / SHARD).open("ab") as file:
            for start in range(100, len(whole), 4000):
                time.sleep(0.2)
                file.write(whole[start : start + 4000])
                file.flush()

    writer = threading.Thread(target=go_on)
    writer.start()
    loader = build(remote=str(remote), local=str(local))
    assert read(loader) == read(build(local=str(prepared)))
    writer.join()
    assert "fetched again" not in caplog.text


def test_verify_full_finds_all_before_the_first_batch(build: Build, copy: Callable[[str], Path]) -> None:
    folder = copy("data")
    for number in (1, 3, 4):
        flip_a_bit(folder / "train" / f"shard.0000{number}.mds")
    with pytest.raises(DataError) as caught:
        build(local=str(folder), verify="full")
    assert [f"shard.0000{number}.mds is damaged" in str(caught.value) for number in range(5)] == [
        *(False, True, False, True, True)
    ]
    shutil.rmtree(folder)
    loader = build(local=str(copy("data")), verify="full")
    assert set(loader.dataset._shard_states.numpy()) == {3}  # nothing is looked at twice


def test_verify_off_looks_at_sizes_alone(build: Build, copy: Callable[[str], Path], prepared: Path) -> None:
    folder = copy("data")
    flip_a_bit(folder / "train" / SHARD)
    assert read(build(local=str(folder), verify="off")) == read(build(local=str(prepared)))
    cut_short(folder / "train" / SHARD)
    with pytest.raises(DataError, match=rf"{SHARD} has "):
        build(local=str(folder), verify="off")


def test_shards_without_hashes_are_compared_by_size_which_is_said_once(
    build: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = np.full(64, 7, np.uint16)
    with MDSWriter(
        columns={"tokens": "ndarray:uint16:64"}, out=str(tmp_path / "train"), size_limit=900
    ) as out:
        for _ in range(20):
            out.write({"tokens": row})
    with caplog.at_level(logging.WARNING):
        assert len(read(build(local=str(tmp_path)))) == 20
    assert caplog.text.count("its index has no hashes, so that only the sizes of files are checked") == 1
    grow(tmp_path / "train" / "shard.00003.mds")
    with pytest.raises(DataError, match=r"shard\.00003\.mds has "):
        build(local=str(tmp_path))


def test_the_hash_that_is_asked_for_is_the_one_that_is_compared(
    build: Build, copy: Callable[[str], Path]
) -> None:
    folder = copy("data")
    assert read(build(local=str(folder), validate_hash="sha1"))
    with pytest.raises(DataError, match=r"validate_hash: shard\.00000\.mds has no md5\. It has sha1, xxh64"):
        read(build(local=str(folder), validate_hash="md5"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_disk_that_takes_no_more_is_named(
    build: Build, prepared: Path, tmp_path: Path, workers: int, small_files: SmallFiles
) -> None:
    loader = build(remote=str(prepared), local=str(tmp_path), num_workers=workers)
    with (
        small_files(10_000),
        pytest.raises(DataError, match=r"shard\.0000\d\.mds can't be fetched: File too large\.$"),
    ):
        read(loader)


@pytest.fixture
def packed(tmp_path: Path) -> Callable[[str], Path]:
    def write(compression: str) -> Path:
        out = tmp_path / "packed" / "train"
        options: dict[str, Any] = {"compression": compression, "hashes": ["xxh64"], "size_limit": 900}
        with MDSWriter(columns={"tokens": "ndarray:uint16:64"}, out=str(out), **options) as writer:
            for number in range(20):
                writer.write({"tokens": np.full(64, number, np.uint16)})
        return out

    return write


@pytest.mark.parametrize("workers", [0, 2])
def test_a_packed_shard_that_is_damaged_is_named(
    build: Build, packed: Callable[[str], Path], workers: int
) -> None:
    folder = packed("zstd")
    flip_a_bit(folder / "shard.00002.mds.zstd")
    loader = build(local=str(folder.parent), num_workers=workers)
    with pytest.raises(DataError, match=r"shard\.00002\.mds\.zstd is damaged: its xxh64"):
        read(loader)


def test_an_unpacked_shard_that_is_damaged_is_unpacked_again(
    build: Build, packed: Callable[[str], Path]
) -> None:
    folder = packed("zstd")
    numbers = read(build(local=str(folder.parent)))
    good = (folder / "shard.00002.mds").read_bytes()
    flip_a_bit(folder / "shard.00002.mds")
    index = json.loads((folder / "index.json").read_text())
    assert "xxh64" in index["shards"][2]["raw_data"]["hashes"]
    assert read(build(local=str(folder.parent))) == numbers
    assert (folder / "shard.00002.mds").read_bytes() == good


def test_nothing_of_an_odd_folder_is_removed(build: Build, packed: Callable[[str], Path]) -> None:
    folder = packed("zstd")
    numbers = read(build(local=str(folder.parent)))
    for path in folder.glob("*.zstd"):
        path.unlink()
    assert read(build(local=str(folder.parent))) == numbers


@pytest.mark.parametrize("verify", ["lazy", "off"])
def test_a_cache_limit_removes_copies_and_nobodys_only_copy(
    build: Build, copy: Callable[[str], Path], prepared: Path, verify: str
) -> None:
    remote, cached, own = copy("remote"), copy("cached"), copy("own")
    streams = {"far": {"remote": str(remote), "local": str(cached)}, "own": {"local": str(own)}}
    loader = build(streams=streams, cache_limit=85_000, verify=verify)
    assert len(read(loader)) == 2 * len(read(build(local=str(prepared))))
    sizes = {folder: sum(p.stat().st_size for p in (folder / "train").iterdir()) for folder in (cached, own)}
    assert sizes[cached] <= 85_000 < sizes[own]
    assert {path.name for path in (own / "train").iterdir()} == {p.name for p in (remote / "train").iterdir()}


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_ends_early_is_an_error_with_its_numbers(
    build: Build, prepared: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = build(local=str(prepared), num_workers=workers)
    each = type(loader.dataset)._each_sample_id

    def lose_some(dataset: Any, it: Any) -> Iterator[int]:
        for count, number in enumerate(each(dataset, it)):
            if count == 6:
                it.non_blocking_exit()
            yield number

    monkeypatch.setattr(type(loader.dataset), "_each_sample_id", lose_some)
    whole = len(loader.dataset)
    message = rf"the epoch ended after \d\d? samples of this rank; its part has {whole}\. Samples were lost"
    with pytest.raises(DataError, match=message):
        read(loader)


def test_the_readers_of_an_epoch_that_is_left_early_end(build: Build, prepared: Path) -> None:
    loader = build(local=str(prepared), predownload=1)
    next(iter(loader))
    waiting = threading.Thread(target=loader.dataset._executor.shutdown, daemon=True)
    waiting.start()
    waiting.join(10)
    assert not waiting.is_alive()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.soak)])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("canonical", [1, pytest.param(2, marks=pytest.mark.soak), 64])
def test_an_epochs_length_is_what_it_deals_with_its_repeats(
    build: Build, prepared: Path, workers: int, drop_last: bool, canonical: int
) -> None:
    options = {"num_workers": workers, "drop_last": drop_last, "num_canonical_nodes": canonical}
    loader = build(local=str(prepared), shuffle=True, **options)
    count = len(loader.dataset)
    assert count % canonical == 0 and count - loader.dataset.epoch_size < canonical
    numbers = read(loader)
    assert len(numbers) == (count // 4 * 4 if drop_last else count)
    if not drop_last:
        assert set(numbers) == set(range(loader.dataset.epoch_size))
        assert sum(1 for _ in build(local=str(prepared), shuffle=True, **options)) == len(loader)


def test_a_resumed_epoch_has_the_samples_that_were_left(build: Build, prepared: Path) -> None:
    options = {"local": str(prepared), "shuffle": True, "num_canonical_nodes": 64}
    loader = build(**options)
    batches = iter(loader)
    for _ in range(5):
        next(batches)
    state = loader.state_dict()
    rest = [number for batch in batches for number in batch["sample_id"].tolist()]
    for batch_size in (4, 2, 5):
        resumed = build(**options, device_batch_size=batch_size)
        resumed.load_state_dict(state)
        assert read(resumed) == rest


def test_an_order_that_depends_on_the_batch_size_is_not_resumed_with_another(
    build: Build, prepared: Path
) -> None:
    streams = {name: {"local": str(prepared), "split": name} for name in ("train", "val")}
    options = {"streams": streams, "batching_method": "stratified", "drop_last": True}
    state = build(**options).state_dict()
    build(**options).load_state_dict(state)
    with pytest.raises(DataError, match=r"batching_method: with stratified .* was 4 and is 8\. Use 4\."):
        build(**options, device_batch_size=8).load_state_dict(state)


@pytest.mark.parametrize("place", [None, {}, {"epoch": 0, "row": 8, "rows_of": "1f"}])
def test_the_place_of_another_loader_is_refused(build: Build, prepared: Path, place: Any) -> None:
    dataset = build(local=str(prepared), split="train").dataset
    with pytest.raises(
        DataError, match=r"another kind of loader saved the checkpoint's position in the data\. Use that"
    ):
        dataset.load_state_dict(place)
