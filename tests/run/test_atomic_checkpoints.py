"""A checkpoint is whole or absent, whatever happens to its writing; training goes on meanwhile."""

from __future__ import annotations

import shutil
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.core import Callback, State
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mptfoundry.checkpoints.checkpoint import find_checkpoint
from mptfoundry.checkpoints.torch_files import load_plain
from mptfoundry.errors import CheckpointError
from mptfoundry.files import remove
from mptfoundry.run import atomic_checkpoints
from mptfoundry.run.atomic_checkpoints import AtomicCheckpoints, copied_to_host
from mptfoundry.run.metrics_file import MetricsFile
from tests.conftest import losses

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    (
        "the disk fills up during a save",
        "a limit on file size, 3",
        "ends with the reason, leaves nothing half-written",
    ),
    (
        "a save will not fit on the disk",
        "the first one; a later one",
        "refused before training; refused before it is begun",
    ),
]

MakeTrainer = Callable[..., Trainer]
SmallFiles = Callable[[int], AbstractContextManager[None]]
Usage = namedtuple("Usage", "total used free")


class Slow:
    """Lets a test hold the writer, and look at what is there meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_go_on = threading.Event()
        self.began = threading.Event()
        save = torch.save

        def held(*args: Any, **kwargs: Any) -> None:
            self.began.set()
            assert self.may_go_on.wait(30)
            save(*args, **kwargs)

        monkeypatch.setattr(torch, "save", held)


class Note(Callback):
    """Keeps the weights as they are at the end of each batch."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def batch_end(self, state: State, logger: object) -> None:
        self.weights.append({name: value.clone() for name, value in state.model.state_dict().items()})


def saver(folder: Path, **options: Any) -> AtomicCheckpoints:
    return AtomicCheckpoints(folder, save_interval=options.pop("save_interval", "2ba"), **options)


def fit(trainer: Trainer) -> None:
    try:
        trainer.fit()
    finally:
        trainer.close()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return bool((one == other).all()) if hasattr(one, "all") else bool(one == other)


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, note = Slow(monkeypatch), Note()
    trainer = make_trainer(max_duration="3ba", callbacks=[note, saver(tmp_path, save_interval="2ba")])
    training = threading.Thread(target=trainer.fit)
    training.start()
    assert slow.began.wait(30)
    deadline = time.monotonic() + 30
    while len(note.weights) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(note.weights) == 3
    assert not any(name.startswith("ep0") for name in names(tmp_path))
    slow.may_go_on.set()
    training.join()
    trainer.close()
    saved = load_plain(tmp_path / "ep0-ba2-rank0.pt")["state"]["model"]
    assert all(torch.equal(saved[name], value) for name, value in note.weights[1].items())
    moved = note.weights[2]
    assert any(not torch.equal(saved[name], value) for name, value in moved.items())


def test_a_copy_of_shards_shares_no_memory_with_them() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    live = distribute_tensor(torch.arange(6.0), init_device_mesh("cpu", (1,)), [Shard(0)])
    fresh = torch.ones(3)
    content = {"a": live, "b": [fresh], "c": 1}
    copy = copied_to_host(content, [live])
    live.to_local().zero_()
    assert isinstance(copy["a"], DTensor) and copy["a"].placements == live.placements
    assert torch.equal(copy["a"].to_local(), torch.arange(6.0))
    assert copy["b"][0].data_ptr() == fresh.data_ptr() and copy["c"] == 1


@pytest.mark.parametrize("name", ["exp#1", "exp?a=b;c", "exp:1", "{exp}", "a%20b", "[x]*"])
def test_a_folder_is_taken_as_it_is_written(make_trainer: MakeTrainer, tmp_path: Path, name: str) -> None:
    fit(make_trainer(max_duration="1ba", callbacks=[saver(tmp_path / name, num_checkpoints_to_keep=1)]))
    assert names(tmp_path) == {name}
    assert names(tmp_path / name) == {"ep0-ba1-rank0.pt", "latest-rank0.pt"}
    assert find_checkpoint(tmp_path / name).path == tmp_path / name / "ep0-ba1-rank0.pt"


def test_both_ways_to_write_give_the_same_checkpoint(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    for name, in_background in (("one", True), ("other", False)):
        fit(make_trainer(max_duration="4ba", callbacks=[saver(tmp_path / name, in_background=in_background)]))
    one, other = (load_plain(tmp_path / name / "ep0-ba4-rank0.pt") for name in ("one", "other"))
    for content in (one, other):
        for key in ("timestamp", "run_name", "callbacks"):  # which hold seconds and names
            content["state"].pop(key)
    assert equal(one, other)


def test_the_link_points_to_the_newest_checkpoint(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    fit(make_trainer(max_duration="2ba", callbacks=[saver(tmp_path)]))
    assert names(tmp_path) == {"ep0-ba2-rank0.pt", "latest-rank0.pt"}
    assert (tmp_path / "latest-rank0.pt").readlink() == Path("ep0-ba2-rank0.pt")


@pytest.mark.parametrize("in_background", [True, False])
def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_leaves_nothing(
    make_trainer: MakeTrainer, tmp_path: Path, small_files: SmallFiles, in_background: bool
) -> None:
    note = Note()
    trainer = make_trainer(callbacks=[note, saver(tmp_path, in_background=in_background)])
    with (
        small_files(20_000),
        pytest.raises(CheckpointError, match=r"ep0-ba2-rank0.pt: can't be written \(.*"),
    ):
        fit(trainer)
    assert 2 <= len(note.weights) <= 4
    assert names(tmp_path) == set()


def test_the_last_checkpoint_that_cannot_be_written_is_an_error_too(
    make_trainer: MakeTrainer, tmp_path: Path, small_files: SmallFiles
) -> None:
    trainer = make_trainer(max_duration="2ba", callbacks=[saver(tmp_path)])
    with (
        small_files(20_000),
        pytest.raises(CheckpointError, match=r"ep0-ba2-rank0.pt: can't be written \(.*"),
    ):
        trainer.fit()


def give_free_space(monkeypatch: pytest.MonkeyPatch, free: Callable[[], int]) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, free()))


def test_a_first_checkpoint_that_will_not_fit_is_refused_before_training(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_free_space(monkeypatch, lambda: 1 << 20)
    parameters = sum(each.numel() for each in make_trainer().state.model.parameters())
    with pytest.raises(CheckpointError, match=rf"a checkpoint takes {parameters * 8:,} bytes, and 1,048,576"):
        make_trainer(callbacks=[saver(tmp_path)])
    assert names(tmp_path) == set()


def test_a_later_one_is_refused_before_it_is_begun_and_those_before_it_stay(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_free_space(monkeypatch, lambda: 0 if (tmp_path / "ep0-ba2-rank0.pt").exists() else 10**9)
    with pytest.raises(CheckpointError, match=r"Free some space, or keep fewer"):
        fit(make_trainer(callbacks=[saver(tmp_path, in_background=False)]))
    assert names(tmp_path) == {"ep0-ba2-rank0.pt", "latest-rank0.pt"}
    assert load_plain(tmp_path / "ep0-ba2-rank0.pt")["state"]["timestamp"]["Timestamp"]["batch"] == 2


def test_older_checkpoints_go_when_the_new_one_is_there_also_those_of_earlier_starts(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(make_trainer(max_duration="2ba", callbacks=[saver(tmp_path, save_interval="1ba")]))
    assert names(tmp_path) == {"ep0-ba1-rank0.pt", "ep0-ba2-rank0.pt", "latest-rank0.pt"}
    seen: list[set[str]] = []
    monkeypatch.setattr(
        atomic_checkpoints, "remove", lambda path: (seen.append(names(tmp_path)), remove(path))
    )
    options = {"num_checkpoints_to_keep": 2, "overwrite": True}
    fit(make_trainer(max_duration="4ba", callbacks=[saver(tmp_path, save_interval="3ba", **options)]))
    assert {"ep0-ba1-rank0.pt", "ep0-ba2-rank0.pt", "ep0-ba3-rank0.pt"} <= seen[0]
    assert names(tmp_path) == {"ep0-ba3-rank0.pt", "ep0-ba4-rank0.pt", "latest-rank0.pt"}


def test_what_is_uploaded_is_whole(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    upload: Any = lambda file, name: shutil.copy(file, store / name)  # noqa: E731
    options = {"upload": upload, "num_checkpoints_to_keep": 0}
    fit(make_trainer(max_duration="4ba", callbacks=[saver(tmp_path / "here", **options)]))
    assert names(store) == {"ep0-ba2-rank0.pt", "ep0-ba4-rank0.pt"}
    assert names(tmp_path / "here") == set()
    assert load_plain(store / "ep0-ba4-rank0.pt")["state"]["timestamp"]["Timestamp"]["batch"] == 4


def test_the_metrics_up_to_a_checkpoint_are_uploaded_before_it(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    seen: list[tuple[str, int]] = []
    upload: Any = lambda file, name: seen.append((name, len(losses(tmp_path))))  # noqa: E731
    saves = saver(tmp_path, upload=upload, upload_small=upload, in_background=False)
    fit(make_trainer(max_duration="4ba", callbacks=[saves], loggers=[MetricsFile(tmp_path)]))
    checkpoints = [("ep0-ba2-rank0.pt", 2), ("ep0-ba4-rank0.pt", 4)]
    assert seen == [pair for name, rows in checkpoints for pair in (("metrics.jsonl", rows), (name, rows))]
