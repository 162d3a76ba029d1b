"""A bit that flipped on a disk: every way in says so, and nothing computes with it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp

from mptfoundry.checkpoints.checksums import CHECKSUMS, checksums_of, write_checksums
from mptfoundry.checkpoints.reading import load_network, open_model
from mptfoundry.errors import CheckpointError
from mptfoundry.export.folder import export
from mptfoundry.export.importing import import_model
from mptfoundry.mpt.network import MPT
from tests.conftest import TINY, composer_state

NAME = "transformer.blocks.1.ffn.up_proj.weight"
NETWORK = MPT(TINY, seed=1)
# 64 bytes of that weight, wherever they are stored.
BYTES = NETWORK.state_dict()[NAME].numpy().tobytes()[64:128]

Make = Callable[[], Path]


def shard(run: Path) -> Path:
    """Replace the checkpoint of a run by a folder of shards, as a run saves it."""
    (run / "ep0-ba10-rank0.pt").unlink()
    (run / "latest-rank0.pt").unlink()
    folder = run / "ep0-ba10"
    state = composer_state(NETWORK, 10)
    dcp.save({"state": state["state"]}, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    write_checksums(folder, checksums_of(sorted(folder.iterdir())))
    return run


@pytest.fixture
def make(write_run: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """A model in one of the forms on disk."""

    def of_kind(kind: str) -> Path:
        run = write_run(network=NETWORK)
        if kind == "whole":
            return run
        if kind in ("sharded", "sharded, no checksums"):
            shard(run)
            if kind != "sharded":
                (run / "ep0-ba10" / CHECKSUMS).unlink()
            return run
        export(run, tmp_path / "hf", dtype="fp32", progress=False)
        if kind == "bin":
            (tmp_path / "hf" / "model.safetensors").unlink()
            (tmp_path / "hf" / CHECKSUMS).unlink()
            torch.save(NETWORK.state_dict(), tmp_path / "hf" / "pytorch_model.bin")
        return tmp_path / "hf"

    return of_kind


def flip(model: Path) -> Path:
    """Flip one bit of that weight; returns the file."""
    for file in sorted(model.rglob("*")):
        if file.is_file() and not file.is_symlink() and (content := file.read_bytes()).count(BYTES) == 1:
            at = content.index(BYTES) + 7
            file.write_bytes(content[:at] + bytes([content[at] ^ 64]) + content[at + 1 :])
            return file
    raise AssertionError(f"the weight isn't in {model}")


KINDS = ("whole", "sharded", "sharded, no checksums", "folder", "bin")


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_of_a_weight_is_named_on_every_way_in(
    make: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    model, out = make(kind), tmp_path / "out"
    file = flip(model)
    ways: list[Callable[..., object]] = [
        lambda **how: list(open_model(model, **how).tensors()),
        lambda **how: load_network(model, **how),
        lambda **how: export(model, out, progress=False, **how),
        lambda **how: import_model(str(model), out, progress=False, **how),
    ]
    for read in ways:
        with pytest.raises(CheckpointError, match=r"holds other bytes than were written .*verify=false") as e:
            read()
        where = file.parent.name if "sharded" in kind else file.name
        assert where in str(e.value) and "\n" not in str(e.value) and not out.exists()
        assert f"damaged, {NAME}" in str(e.value)
        read(verify=False)
        shutil.rmtree(out, ignore_errors=True)


@pytest.mark.parametrize("kind", ["whole", "sharded", "folder", "bin"])
def test_a_few_rows_are_verified_as_well(make: Callable[[str], Path], kind: str) -> None:
    """A rank that holds some rows of a matrix reads no more, and the flipped bit may be in another's."""
    model = make(kind)
    flip(model)
    with pytest.raises(CheckpointError, match="holds other bytes than were written"):
        open_model(model).weights.read(NAME, rows=(100, 101))


@pytest.mark.parametrize("kind", KINDS)
def test_sound_weights_are_read_as_they_are(make: Callable[[str], Path], kind: str) -> None:
    model = make(kind)
    for _ in range(2):
        source = open_model(model)
        for name, tensor in source.tensors():
            assert torch.equal(tensor, NETWORK.state_dict()[name])
        assert torch.equal(source.weights.read(NAME, rows=(3, 5)), NETWORK.state_dict()[NAME][3:5])


def test_what_has_no_checksums_is_said_once(
    make: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make("folder")
    capsys.readouterr()
    open_model(folder)
    assert capsys.readouterr().err == ""
    (folder / CHECKSUMS).unlink()
    open_model(folder)
    assert capsys.readouterr().err == f"note: {folder} has no {CHECKSUMS} and is read unverified.\n"
    open_model(folder, verify=False)
    assert capsys.readouterr().err == ""
    sharded = make("sharded, no checksums") / "ep0-ba10"
    open_model(sharded)
    assert f"{sharded} has no {CHECKSUMS}: its .metadata is read unverified" in capsys.readouterr().err


def test_a_file_that_torch_wrote_without_checksums_is_read_and_said_to_be(
    write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        run = write_run(network=NETWORK)
    finally:
        torch.serialization.set_crc32_options(True)
    list(open_model(run).tensors())
    assert "ep0-ba10-rank0.pt was written without checksums and is read unverified" in capsys.readouterr().err


def test_a_folder_that_another_program_wrote_again_says_what_to_remove(make: Callable[[str], Path]) -> None:
    folder = make("folder")
    other = {name: tensor + 1 for name, tensor in NETWORK.state_dict().items()}
    save_file(other, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=rf"If the folder was written again since, remove its {CHECKSUMS}"
    ):
        list(open_model(folder).tensors())
    (folder / CHECKSUMS).write_text('{"tensors": [1]}')
    with pytest.raises(CheckpointError, match="it holds no checksums of tensors"):
        open_model(folder)
    (folder / CHECKSUMS).unlink()
    list(open_model(folder).tensors())


def test_a_snapshot_of_the_hub_is_compared_with_the_names_of_its_blobs(
    make: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make("folder")
    snapshot, blobs = tmp_path / "hub/snapshots/abc", tmp_path / "hub/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    blob = blobs / hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    shutil.copy(folder / "model.safetensors", blob)
    shutil.copy(folder / "config.json", snapshot)
    (snapshot / "model.safetensors").symlink_to(blob)
    capsys.readouterr()
    list(open_model(snapshot).tensors())
    assert capsys.readouterr().err == ""
    flip(blobs)
    with pytest.raises(CheckpointError, match=r"model.safetensors: damaged, .* \(its sha256 is"):
        list(open_model(snapshot).tensors())


def test_a_download_of_the_hub_is_compared_with_the_clients_note(make: Callable[[str], Path]) -> None:
    folder = make("folder")
    (folder / CHECKSUMS).unlink()
    file, note = (
        folder / "model.safetensors",
        folder / ".cache/huggingface/download/model.safetensors.metadata",
    )
    note.parent.mkdir(parents=True)
    changed_at = file.stat().st_mtime
    note.write_text(f"abc\n{hashlib.sha256(file.read_bytes()).hexdigest()}\n{changed_at}\n")
    list(open_model(folder).tensors())
    flip(folder)
    os.utime(file, (changed_at, changed_at))
    with pytest.raises(CheckpointError, match=r"damaged, .* \(its sha256 is"):
        list(open_model(folder).tensors())
    os.utime(file, (changed_at + 60, changed_at + 60))
    list(open_model(folder).tensors())


def test_the_newest_checkpoint_of_a_run_is_not_exchanged_for_an_older_one_when_it_is_damaged(
    write_run: Callable[..., Path],
) -> None:
    run = write_run(batch=5)
    write_run(batch=10)
    file = run / "ep0-ba10-rank0.pt"
    content = file.read_bytes()
    at = content.index(b"data.pkl")  # in the archive's list of members
    at = content.rindex(b"data.pkl")
    file.write_bytes(content[:at] + b"dXta.pkl" + content[at + 8 :])
    with pytest.raises(CheckpointError, match=r"ep0-ba10-rank0.pt: damaged.*or name another checkpoint"):
        open_model(run)


@pytest.mark.parametrize("scale", [1e6, 1e160])
def test_absurd_logits_fail_an_export_which_says_what_lets_it_through(
    write_run: Callable[..., Path], tmp_path: Path, scale: float
) -> None:
    network = MPT(TINY, seed=1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("wte.weight"):
                parameter.mul_(min(scale, 1e15))
    run = write_run(network=network)
    with pytest.raises(CheckpointError, match=r"its logits reach .*set verify=false to export this one"):
        export(run, tmp_path / "out", dtype="fp32", progress=False)
    assert not (tmp_path / "out").exists()
    export(run, tmp_path / "out", dtype="fp32", verify=False, progress=False)


def test_a_run_that_starts_from_damaged_weights_does_not_start(make: Callable[[str], Path]) -> None:
    from mptfoundry.checkpoints.starting import StartingWeights

    for kind in ("whole", "folder"):
        model = make(kind)
        flip(model)
        with pytest.raises(CheckpointError, match="holds other bytes than were written"):
            StartingWeights(open_model(model), NETWORK, seed=0).fill(MPT(TINY, seed=2))


def test_a_config_that_was_changed_since_is_said(
    make: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make("folder")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"use_cache": true', '"use_cache": false'))
    capsys.readouterr()
    list(open_model(folder).tensors())
    assert capsys.readouterr().err == f"note: {folder}/config.json is not as it was written.\n"


def test_an_exported_folder_has_the_checksum_of_each_tensor(make: Callable[[str], Path]) -> None:
    written = json.loads((make("folder") / CHECKSUMS).read_text())
    assert sorted(written["tensors"]) == sorted(name for name, _ in NETWORK.named_parameters())


def test_ranks_verify_a_share_each_before_they_read_their_rows(
    make: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mptfoundry.checkpoints import starting

    model, read = make("whole"), []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(starting.dist, "all_gather_object", lambda own: [None, own])
    source = open_model(model)
    names = list(source.weights.outlines)
    kept = source.weights.read
    source.weights.read = lambda name, *a, **k: (read.append(name), kept(name, *a, **k))[1]  # type: ignore[method-assign]
    starting.StartingWeights(source, NETWORK, seed=0)
    assert read == names[1::2] and not source.verifier.is_on
    flip(model)
    with pytest.raises(CheckpointError, match="holds other bytes"):
        for rank in range(2):
            monkeypatch.setenv("RANK", str(rank))
            starting.StartingWeights(open_model(model), NETWORK, seed=0)
