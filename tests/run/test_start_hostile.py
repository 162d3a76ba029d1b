"""Checkpoints that someone made to do harm: a training that starts from one refuses it, and nothing ran."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mptfoundry.config.load import load_train_config
from mptfoundry.errors import CheckpointError, ConfigError, MPTFoundryError
from mptfoundry.train import train
from tests.conftest import RunsCode

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    (
        "pickles that run code, in every part of a checkpoint",
        "8 forged files, 5 archives, 4 in shards",
        "refused; the error names what they call",
    ),
    ("text that Composer would evaluate", "8 forged files", "never evaluated"),
]


class BuildsThenSets:
    """Calls nothing as it is made, and a function when its state is set."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, ...]:
        return torch.nn.Module, (), {"_forward_hooks": RunsCode(self.command)}


def run(tiny_runs: Path, name: str, *words: str) -> Path:
    words = ("max_duration=2ba", "log_to_console=false", f"run_name={name}", "save_interval=1ba", *words)
    train(load_train_config(tiny_runs, words)[0])
    return tiny_runs.parent / name


@pytest.fixture(scope="module")
def honest(tiny_runs: Path) -> dict[str, Any]:
    """The content of a run's checkpoint."""
    return torch.load(run(tiny_runs, "honest") / "ep0-ba2-rank0.pt", weights_only=False)  # type: ignore[no-any-return]


def in_the_state(content: dict[str, Any], command: str) -> None:
    content["state"]["evil"] = RunsCode(command)


def in_the_random_state(content: dict[str, Any], command: str) -> None:
    content["rng"] = [RunsCode(command)]


def in_an_object_array(content: dict[str, Any], command: str) -> None:
    content["state"]["evil"] = np.array([RunsCode(command)], dtype=object)


def in_a_modules_state(content: dict[str, Any], command: str) -> None:
    content["state"]["callbacks"] = {"Throughput": BuildsThenSets(command)}


PICKLED = [in_the_state, in_the_random_state, in_an_object_array, in_a_modules_state]


@pytest.mark.parametrize("named", [False, True], ids=["own", "load_path"])
@pytest.mark.parametrize("hide", PICKLED)
def test_a_pickle_that_runs_code_is_refused_by_the_name_of_what_it_calls(
    tiny_runs: Path,
    honest: dict[str, Any],
    tmp_path: Path,
    hide: Callable[[dict[str, Any], str], None],
    named: bool,
) -> None:
    content = {"state": dict(honest["state"]), "rng": honest["rng"]}
    hide(content, f"touch {tmp_path}/trace")
    folder = tiny_runs.parent / f"{hide.__name__}-{named}"
    folder.mkdir()
    torch.save(content, folder / "ep0-ba2-rank0.pt")
    words = ["load_path=" + str(folder / "ep0-ba2-rank0.pt"), "run_name=from-" + folder.name] if named else []
    with pytest.raises(
        CheckpointError, match=r"refused, since loading it would call .*(system|Module)"
    ) as error:
        run(tiny_runs, folder.name, "max_duration=3ba", *words)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", ["Alibi", "FusedLayerNorm", "GradientClipping", "os"])
@pytest.mark.parametrize("weights_only", [False, True])
def test_text_that_composer_would_evaluate_is_not_looked_at(
    tiny_runs: Path, honest: dict[str, Any], tmp_path: Path, name: str, weights_only: bool
) -> None:
    evil = f"__class__.__base__.__subclasses__() or __import__('os').system('touch {tmp_path}/trace')"
    content = {**honest, "state": {**honest["state"], "algorithms": [(name, {"repr": evil})]}}
    torch.save(content, tmp_path / "evil.pt")
    words = [f"load_path={tmp_path}/evil.pt", f"load_weights_only={weights_only}", "max_duration=3ba"]
    run(tiny_runs, f"text-{name}-{weights_only}", *words)
    assert not (tmp_path / "trace").exists()


def a_tar(file: Path) -> None:
    with tarfile.open(file, "w") as archive:
        member = tarfile.TarInfo("../../escaped")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"evil"))


@pytest.mark.parametrize("name", ["evil.tar", "evil.pt.tar.gz", "evil.tgz", "evil.pt.bz2"])
def test_an_archive_is_refused_by_its_name(tiny_runs: Path, tmp_path: Path, name: str) -> None:
    a_tar(tmp_path / name)
    with pytest.raises(
        ConfigError, match=r"is not a plain file. Archives and compressed checkpoints are not read"
    ):
        run(tiny_runs, "tar", f"load_path={tmp_path / name}")
    with pytest.raises(ConfigError, match=r"save_filename.* is not a plain file"):
        run(tiny_runs, "tar", f"save_filename={name}")


def test_an_archive_under_another_name_is_refused_too(tiny_runs: Path, tmp_path: Path) -> None:
    a_tar(tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        run(tiny_runs, "tar", f"load_path={tmp_path}/evil.pt")
    assert not (tmp_path.parent / "escaped").exists() and not (tiny_runs.parent / "escaped").exists()


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"model": 3},
        {"model": {}, "optimizers": 3, "timestamp": {}},
        {"model": {}, "algorithms": 7},
        {"model": {}, "algorithms": [1, 2]},
        {"model": {"model.transformer.wte.weight": torch.ones(3)}},
        {"timestamp": {"Timestamp": {"batch": "x"}}, "model": {}},
    ],
    ids=["empty", "number", "optimizers", "algorithms", "pairs", "shape", "timestamp"],
)
def test_a_state_of_another_form_is_one_error(tiny_runs: Path, tmp_path: Path, state: dict[str, Any]) -> None:
    torch.save({"state": state}, tmp_path / "odd.pt")
    with pytest.raises(MPTFoundryError) as error:
        run(tiny_runs, f"odd-{abs(hash(str(state)))}", f"load_path={tmp_path}/odd.pt")
    assert "\n" not in str(error.value)
