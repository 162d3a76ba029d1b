"""Sharded checkpoints: a start goes on from the newest whole one, and runs nothing that lies in it."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mptfoundry.checkpoints.checksums import CHECKSUMS, checksums_of, write_checksums
from mptfoundry.config.load import load_train_config
from mptfoundry.errors import CheckpointError, ConfigError
from mptfoundry.run import atomic_checkpoints
from mptfoundry.run.start import resolve_start
from mptfoundry.train import train
from tests.conftest import RunsCode, losses

pytestmark = pytest.mark.long

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    ("a shard or the metadata of a sharded checkpoint is cut or lost", "3", "passed over"),
    ("a bit flips in shards, metadata or checksums", "9", "an error names it; the one before on request"),
    ("a weight or an optimizer moment is missing", "edited metadata", "an error"),
]

WORDS = ["max_duration=9ba", "log_to_console=false", "fsdp_config={state_dict_type: sharded}"]


def run(tiny_runs: Path, name: str, *words: str) -> None:
    train(load_train_config(tiny_runs, [*WORDS, f"run_name={name}", *words])[0])


@pytest.fixture(scope="module")
def whole(tiny_runs: Path) -> Path:
    run(tiny_runs, "whole")
    return tiny_runs.parent / "whole"


@pytest.fixture
def stopped(whole: Path, request: pytest.FixtureRequest) -> Path:
    """The folder of the run as it was after six batches."""
    folder = whole.parent / f"stopped-{abs(hash(request.node.name))}"
    shutil.copytree(whole, folder, symlinks=True)
    shutil.rmtree(folder / "ep0-ba9")
    return folder


def start_of(tiny_runs: Path, folder: Path, *words: str) -> Path | None:
    given, _ = load_train_config(tiny_runs, [*WORDS, f"run_name={folder.name}", *words])
    with resolve_start(given) as start:
        return start.checkpoint


def flip(file: Path, share: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(share * len(content))] ^= 1
    file.write_bytes(content)


def test_a_stopped_run_goes_on_bitwise(tiny_runs: Path, whole: Path, stopped: Path) -> None:
    files = {path.name for path in (whole / "ep0-ba9").iterdir()}
    assert files == {".metadata", "__0_0.distcp", "checksums.json"}
    run(tiny_runs, stopped.name)
    assert losses(stopped) == losses(whole)
    sums = [json.loads((folder / "ep0-ba9" / CHECKSUMS).read_text()) for folder in (whole, stopped)]
    assert sums[0]["files"].keys() == sums[1]["files"].keys()


def test_from_an_older_checkpoint_at_the_end_of_an_epoch_the_next_one_is_read(
    tiny_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train_loader.dataset.epoch_size=16", "max_duration=2ep", "save_interval=1ep"]
    words += ["scheduler={name: constant_with_warmup, t_warmup: 1ba}"]
    run(tiny_runs, "epochs", *words)
    monkeypatch.setattr(atomic_checkpoints, "set_epoch_by_time", lambda state: None)
    run(tiny_runs, "epochs-older", *words, "max_duration=1ep")
    monkeypatch.undo()
    run(tiny_runs, "epochs-older", *words)
    assert losses(tiny_runs.parent / "epochs-older") == losses(tiny_runs.parent / "epochs")


def test_a_folder_of_shards_remembers_the_config_too(tiny_runs: Path, stopped: Path) -> None:
    (stopped / "config.yaml").unlink()
    assert start_of(tiny_runs, stopped) == stopped / "ep0-ba6"
    with pytest.raises(ConfigError, match=r"seed: 17 in the run of .*, 18 here"):
        start_of(tiny_runs, stopped, "seed=18")


def cut_shard(folder: Path) -> None:
    os.truncate(folder / "__0_0.distcp", 1000)


def lose_shard(folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()


def lose_outline(folder: Path) -> None:
    (folder / ".metadata").unlink()


@pytest.mark.parametrize("damage", [cut_shard, lose_shard, lose_outline])
def test_an_unfinished_one_is_passed_over_and_named(
    tiny_runs: Path, stopped: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(stopped / "ep0-ba6")
    assert start_of(tiny_runs, stopped) == stopped / "ep0-ba3"
    assert f"{stopped}/ep0-ba6: " in capsys.readouterr().out


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", CHECKSUMS])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_a_flipped_bit_is_named_and_the_one_before_is_taken_on_request(
    tiny_runs: Path, stopped: Path, file: str, share: float
) -> None:
    flip(stopped / "ep0-ba6" / file, share)
    with pytest.raises(CheckpointError, match=rf"{stopped}/ep0-ba6: .*resume_past_damage=true"):
        start_of(tiny_runs, stopped)
    assert start_of(tiny_runs, stopped, "resume_past_damage=true") == stopped / "ep0-ba3"


def test_a_whole_checkpoint_does_not_start_a_sharded_run_nor_the_other_way(
    tiny_runs: Path, whole: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"is a folder of shards, and this run has whole checkpoints"):
        run(tiny_runs, "full", f"load_path={whole}", "fsdp_config=null")


def seal(folder: Path) -> None:
    write_checksums(folder, checksums_of([folder / ".metadata", *folder.glob("*.distcp")]))


def in_the_outline(folder: Path, payload: RunsCode) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data["evil"] = payload
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def in_a_value(folder: Path, payload: RunsCode) -> None:
    """In place of the run's name, which is stored as a pickle of its own."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    key = next(key for key in metadata.storage_data if key.fqn == "state.run_name")
    piece = io.BytesIO()
    torch.save(payload, piece)
    file = folder / "__0_0.distcp"
    place = metadata.storage_data[key]
    place.offset, place.length = file.stat().st_size, len(piece.getvalue())
    file.write_bytes(file.read_bytes() + piece.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("hide", [in_the_outline, in_a_value])
@pytest.mark.parametrize("named", [False, True], ids=["own", "load_path"])
def test_nothing_that_lies_in_a_checkpoint_runs(
    tiny_runs: Path, stopped: Path, tmp_path: Path, hide: Callable[[Path, RunsCode], None], named: bool
) -> None:
    hide(stopped / "ep0-ba6", RunsCode(f"touch {tmp_path}/trace"))
    seal(stopped / "ep0-ba6")
    words = [f"load_path={stopped}/ep0-ba6"] if named else []
    with pytest.raises(CheckpointError, match=r"refused, since reading it would"):
        run(tiny_runs, f"{stopped.name}-new" if named else stopped.name, *words)
    assert not (tmp_path / "trace").exists()


def test_what_is_missing_in_a_checkpoint_is_an_error_where_it_is_a_weight(
    tiny_runs: Path, stopped: Path
) -> None:
    folder = stopped / "ep0-ba6"
    metadata: Any = pickle.loads((folder / ".metadata").read_bytes())
    gone = next(key for key in metadata.state_dict_metadata if key.endswith("exp_avg"))
    del metadata.state_dict_metadata[gone]
    metadata.storage_data = {k: v for k, v in metadata.storage_data.items() if k.fqn != gone}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(folder)
    with pytest.raises(CheckpointError, match=r"1 parts are missing, such as state\.optimizers\."):
        run(tiny_runs, stopped.name)
