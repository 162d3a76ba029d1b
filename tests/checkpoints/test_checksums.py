from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest
import torch

from mptfoundry.checkpoints.checkpoint import checkpoint_at
from mptfoundry.checkpoints.checksums import CHECKSUMS, checksums_of, write_checksums
from mptfoundry.checkpoints.torch_files import load_plain
from mptfoundry.errors import CheckpointError

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    (
        "any bit of a checkpoint file flips",
        "every seventh byte; each in `make soak`",
        "noticed, or the tensors are unchanged",
    ),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.save({"state": {"model": {"a": torch.arange(64.0), "b": torch.ones(3)}}}, tmp_path / "a.pt")
    return tmp_path / "a.pt"


def test_no_flipped_bit_of_a_file_changes_what_is_read_unnoticed(file: Path) -> None:
    """One byte after the other: what isn't noticed is filling, or a field that nobody reads."""
    content, checkpoint = file.read_bytes(), checkpoint_at(file)
    expected = load_plain(file)["state"]["model"]
    noticed = 0
    places = range(0, len(content), 1 if os.environ.get("MPTFOUNDRY_SOAK") == "1" else 7)
    for place in places:
        file.write_bytes(content[:place] + bytes([content[place] ^ 8]) + content[place + 1 :])
        try:
            if checkpoint.problem() or checkpoint.damage(checkpoint.parts()):
                noticed += 1
                continue
            found = load_plain(file)["state"]["model"]
        except CheckpointError:
            noticed += 1
            continue
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert noticed > 0.3 * len(places)
    file.write_bytes(content)
    assert checkpoint.damage(checkpoint.parts()) is None


def test_a_folder_names_the_file_that_changed(tmp_path: Path) -> None:
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
        (tmp_path / name).write_bytes(name.encode() * 1000)
    write_checksums(tmp_path, checksums_of(sorted(tmp_path.iterdir())))
    checkpoint = checkpoint_at(tmp_path)
    parts = checkpoint.parts()
    assert parts == [".metadata", "__0_0.distcp", "__1_0.distcp"] and checkpoint.damage(parts) is None
    (tmp_path / "__1_0.distcp").write_bytes(b"__1_1.distcp" * 1000)
    crc = zlib.crc32(b"__1_1.distcp" * 1000)
    assert checkpoint.damage(parts) == (
        f"damaged, __1_0.distcp holds other bytes than were written (its CRC-32 is {crc:08x})"
    )
    assert checkpoint.damage(parts[:2]) is None


def test_checksums_that_lead_elsewhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "ep0-ba1"
    folder.mkdir()
    checkpoint = checkpoint_at(folder)
    write_checksums(folder, {"../secret": {"bytes": 1, "crc32": "0"}})
    assert "refused, since it names '../secret'" in str(checkpoint.damage(checkpoint.parts()))
    (folder / CHECKSUMS).write_text("[]")
    with pytest.raises(CheckpointError, match="not a dictionary"):
        checkpoint.parts()
