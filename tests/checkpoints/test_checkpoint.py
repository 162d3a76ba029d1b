from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from mptfoundry.checkpoints.checkpoint import checkpoint_at, find_checkpoint, newest_first
from mptfoundry.checkpoints.checksums import Verifier
from mptfoundry.errors import CheckpointError


def save(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state": {"model": {}}}, path)
    return path


def save_sharded(folder: Path) -> Path:
    dcp.save(
        {"state": {"model": {"a": torch.ones(4)}}}, storage_writer=dcp.FileSystemWriter(folder), no_dist=True
    )
    return folder


def test_the_newest_is_found_by_batch_and_not_by_alphabet_time_or_link(tmp_path: Path) -> None:
    for name in ("ep1-ba1000-rank0.pt", "ep0-ba9-rank0.pt", "ep0-ba999-rank0.pt"):
        save(tmp_path / name)
    (tmp_path / "latest-rank0.pt").symlink_to("ep0-ba9-rank0.pt")
    assert find_checkpoint(tmp_path).path == tmp_path / "ep1-ba1000-rank0.pt"


def test_a_checkpoint_that_was_cut_short_is_passed_over_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "ep0-ba1-rank0.pt")
    cut = save(tmp_path / "ep0-ba2-rank0.pt")
    os.truncate(cut, cut.stat().st_size // 2)
    assert find_checkpoint(tmp_path).path == tmp_path / "ep0-ba1-rank0.pt"
    assert "ep0-ba2-rank0.pt: damaged or cut short" in caplog.text
    os.truncate(tmp_path / "ep0-ba1-rank0.pt", 10)
    with pytest.raises(CheckpointError, match=r"none of its 2 checkpoints is whole"):
        find_checkpoint(tmp_path)


def test_a_sharded_checkpoint_is_a_folder(tmp_path: Path) -> None:
    save(tmp_path / "ep0-ba1-rank0.pt")
    newest = save_sharded(tmp_path / "ep0-ba2")
    (tmp_path / "latest-sharded-rank0").symlink_to("ep0-ba2")
    assert find_checkpoint(tmp_path).path == newest
    assert find_checkpoint(newest).path == newest
    assert find_checkpoint(tmp_path / "latest-sharded-rank0").path == newest


def test_an_unfinished_sharded_checkpoint_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "ep0-ba1-rank0.pt")
    save_sharded(tmp_path / "ep0-ba2")
    (tmp_path / "ep0-ba2" / ".metadata").unlink()
    save_sharded(tmp_path / "ep0-ba3")
    os.truncate(tmp_path / "ep0-ba3" / "__0_0.distcp", 10)
    save_sharded(tmp_path / "ep0-ba4")
    (tmp_path / "ep0-ba4" / "__0_0.distcp").unlink()
    assert find_checkpoint(tmp_path).path == tmp_path / "ep0-ba1-rank0.pt"
    for said in ("ba2: unfinished", "__0_0.distcp was cut short at 10 of", "__0_0.distcp is missing"):
        assert said in caplog.text


def test_a_file_is_itself_and_a_link_is_followed(tmp_path: Path) -> None:
    file = save(tmp_path / "mine.pt")
    (tmp_path / "link").symlink_to(file)
    for path in (file, tmp_path / "link", tmp_path):
        assert find_checkpoint(path).path == file


def test_an_error_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"no such file or folder. Give a run folder, a checkpoint \(ep0"
    ):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"Looked for \*.pt files and for folders with .metadata"):
        find_checkpoint(tmp_path)
    (tmp_path / "latest-rank0.pt").symlink_to("ep0-ba1-rank0.pt")
    with pytest.raises(CheckpointError, match=r"the link points at ep0-ba1-rank0.pt, which is not there"):
        find_checkpoint(tmp_path / "latest-rank0.pt")


def test_names_tell_the_progress() -> None:
    names = ("ep2-ba30-rank0.pt", "ep2-ba30", "final.pt")
    assert [checkpoint_at(Path("x") / name).batch for name in names] == [30, 30, -1]


def test_both_forms_give_the_same_weights_and_values(tmp_path: Path) -> None:
    content = {"state": {"model": {"model.transformer.wte.weight": torch.ones(4, 2)}}, "run": "what it notes"}
    torch.save(content, tmp_path / "ep0-ba1-rank0.pt")
    dcp.save(content, storage_writer=dcp.FileSystemWriter(tmp_path / "ep0-ba2"), no_dist=True)
    for checkpoint in newest_first(tmp_path):
        assert checkpoint.unfinished() is None and checkpoint.problem() is None
        assert checkpoint.damage(checkpoint.parts()) is None
        assert checkpoint.value("run") == "what it notes" and checkpoint.value("another") is None
        assert torch.equal(checkpoint.weights(Verifier()).read("transformer.wte.weight"), torch.ones(4, 2))
    assert newest_first(tmp_path / "nowhere") == []


def test_a_folder_is_looked_at_while_its_run_deletes_older_ones(tmp_path: Path) -> None:
    is_over = threading.Event()

    def save_and_delete() -> None:
        while not is_over.is_set():
            (tmp_path / "ep0-ba1-rank0.pt").touch()
            (tmp_path / "ep0-ba1-rank0.pt").unlink()

    with ThreadPoolExecutor() as pool:
        run = pool.submit(save_and_delete)
        try:
            for _ in range(20000):
                newest_first(tmp_path)
        finally:
            is_over.set()
        run.result()
