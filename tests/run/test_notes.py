"""A checkpoint remembers its run's config and what it read, in a file as in a folder of shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp

from mptfoundry.errors import CheckpointError
from mptfoundry.run.changes import RUN, RunNotes, read_notes
from tests.fuzz import damaged_bytes, odd_values

NOTES = RunNotes("seed: 17\nname: naïve ${x}\n", {"train_loader.dataset.streams.a": "0f" * 32})
Write = Callable[[Path, Any], Path]


def as_file(path: Path, text: Any) -> Path:
    content = {"state": {"model": {"model.w": torch.ones(1000)}}, **({} if text is None else {RUN: text})}
    torch.save(content, path)
    return path


def as_folder(path: Path, text: Any) -> Path:
    content = {"state": {"model": {"model.w": torch.ones(1000)}}, **({} if text is None else {RUN: text})}
    dcp.save(content, storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    return path


FORMATS = pytest.mark.parametrize("write", [as_file, as_folder])


@FORMATS
def test_what_was_noted_is_read(write: Write, tmp_path: Path) -> None:
    assert read_notes(write(tmp_path / "ep0-ba1", NOTES.to_text())) == NOTES


@FORMATS
def test_an_older_checkpoint_remembers_nothing(write: Write, tmp_path: Path) -> None:
    assert read_notes(write(tmp_path / "ep0-ba1", None)) is None


def test_odd_notes_are_an_error_with_the_checkpoints_name(tmp_path: Path) -> None:
    texts = [text for _, text in damaged_bytes(NOTES.to_text().encode(), seed=1, count=40)]
    texts += [json.dumps(value).encode() for _, value in odd_values(json.loads(NOTES.to_text()), 2, 40)]
    refused = 0
    for number, text in enumerate([*(text.decode(errors="replace") for text in texts), 7, b"{}", "[]"]):
        checkpoint = as_file(tmp_path / f"ep0-ba{number}-rank0.pt", text)
        try:
            notes = read_notes(checkpoint)
        except CheckpointError as error:
            assert str(checkpoint) in str(error) and "damaged" in str(error)
            refused += 1
        else:
            assert notes is not None
            assert all(isinstance(each, str) for each in (notes.config, *notes.fingerprints.values()))
    assert refused > 40
