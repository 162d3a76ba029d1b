"""A start that is refused has written nothing, and one that is killed early has changed nothing."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from composer.core import Callback, State
from composer.loggers import Logger

from mptfoundry import build
from mptfoundry.config.load import load_train_config
from mptfoundry.errors import CheckpointError, ConfigError, DataError, MPTFoundryError, RunStopped
from mptfoundry.train import train
from tests.conftest import losses
from tests.marks import some_of
from tests.runs import run, whole
from tests.runs import stopped as before_the_last

__all__ = ["before_the_last", "run", "whole"]

pytestmark = pytest.mark.long

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    (
        "a start is refused, for 30 reasons, or ended while it is set up",
        "in one process",
        "the run's folder is unchanged, byte for byte",
    ),
]

Usage = namedtuple("Usage", "total used free")
WORDS = ("max_duration=4ba", "save_interval=2ba", "log_to_console=false")


@pytest.fixture
def stopped(before_the_last: Path) -> Path:
    """The folder of a run that was killed in its third batch, with what a killed one leaves."""
    (before_the_last / ".lock").write_text('{"host": "elsewhere", "pid": 17}')
    (before_the_last / ".ep0-ba4-rank0.pt.elsewhere.17.part").write_bytes(b"half")
    return before_the_last


def content(folder: Path) -> dict[str, Any]:
    """Every file, folder and link with what is in it."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")) if folder.exists() else ():
        name = str(path.relative_to(folder))
        found[name] = path.readlink() if path.is_symlink() else path.is_file() and path.read_bytes()
    return found


class Fails(Callback):
    """Raises at an event what a test wants."""

    def __init__(self, event: str, error: BaseException) -> None:
        setattr(self, event, self._raise)
        self.error = error

    def _raise(self, state: State, logger: Logger) -> None:
        raise self.error


# Words of a start that is refused, and what the refusal says.
REFUSED = {
    "another batch size": (["global_train_batch_size=4"], "global_train_batch_size: 8 in the run of"),
    "another model": (["model.d_model=64"], "checkpoints of another model"),
    "from nothing, over its checkpoints": (["autoresume=false"], "is further than this start, batch 0"),
    "from nothing with other options": (["autoresume=false", "seed=3"], "is further than this start"),
    "a load_path that is missing": (
        ["autoresume=false", "load_path=nowhere"],
        "load_path: nowhere is missing",
    ),
    "a load_path that is finished": (
        ["autoresume=false", "save_overwrite=true", "load_path={whole}"],
        "nothing is left to train",
    ),
    "adapters on it": (["model.peft_config={{r: 2, target_modules: [Wqkv]}}"], "of another model|peft"),
    "data that is missing": (
        ["train_loader.dataset.streams.a.local=nowhere", "allow_changes=[train_loader]"],
        "nowhere",
    ),
    "shards of another length": (["max_seq_len=64", "allow_changes=[max_seq_len,model]"], "max_seq_len"),
    "held-out data that is missing": (["eval_loader={{name: text, dataset: {{local: nowhere}}}}"], "nowhere"),
    "a tokenizer that is missing": (["tokenizer.name=nowhere/t", "allow_changes=[tokenizer]"], "nowhere/t"),
    "code that is missing": (["code_paths=[nowhere.py]", "allow_code=true"], "nowhere.py is missing"),
    "a parameter pattern without parameters": (
        ["optimizer.param_groups=[{{param_str_match: nothing, lr: 0.1}}]", "allow_changes=[optimizer]"],
        "nothing",
    ),
    "everything frozen": (
        ["optimizer.disable_grad=.*", "allow_changes=[optimizer]"],
        "disable_grad|every parameter",
    ),
    "weights that are missing": (
        ["model.pretrained_model_name_or_path=nowhere/m", "save_overwrite=true"],
        "nowhere/m",
    ),
    "shards of checkpoints": (
        ["fsdp_config={{state_dict_type: sharded}}"],
        "ep0-ba2-rank0.pt is one file, and fsdp_config",
    ),
    "an export's folder name": (
        ["callbacks={{hf_checkpointer: {{save_folder: x, save_interval: 1ba, huggingface_folder_name: y}}}}"],
        "huggingface_folder_name",
    ),
    "keys of a state that are missing": (
        ["load_path={whole}", "autoresume=false", "model.n_layers=3"],
        "n_layers|another model|does not fit",
    ),
}


@pytest.mark.parametrize("name", some_of(REFUSED))
def test_a_refused_start_leaves_the_runs_folder_byte_for_byte(
    run: Callable[..., Path], whole: Path, stopped: Path, name: str
) -> None:
    words, said = REFUSED[name]
    before = content(stopped)
    with pytest.raises(MPTFoundryError, match=f"(?s){said}"):
        run(stopped.name, *(word.format(whole=whole) for word in words))
    assert content(stopped) == before


@pytest.mark.parametrize(
    "name",
    [
        "data that is missing",
        "a tokenizer that is missing",
        "a load_path that is missing",
        "code that is missing",
    ],
)
def test_a_refused_start_of_a_new_run_leaves_no_folder(
    run: Callable[..., Path], tiny_runs: Path, name: str
) -> None:
    with pytest.raises(MPTFoundryError):
        run("never", *REFUSED[name][0])
    assert not (tiny_runs.parent / "never").exists()


def a_flipped_bit(folder: Path) -> None:
    file = folder / "ep0-ba2-rank0.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def a_config_that_is_cut(folder: Path) -> None:
    file = folder / "config.yaml"
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def a_config_without_its_end(folder: Path) -> None:
    file = folder / "config.yaml"
    file.write_text(file.read_text().removesuffix("variables: {}\n"))


def an_empty_config(folder: Path) -> None:
    (folder / "config.yaml").write_bytes(b"")


def a_config_of_other_bytes(folder: Path) -> None:
    (folder / "config.yaml").write_bytes(b"run_name: \xff\n")


def a_file_for_the_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").write_text("mine")


def a_folder_for(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()
        (folder / name / "mine").write_text("mine")

    return make


def without_notes(folder: Path) -> None:
    """Have the checkpoint be one of an older version."""
    checkpoint = folder / "ep0-ba2-rank0.pt"
    content = torch.load(checkpoint, weights_only=False)
    del content["run"]
    torch.save(content, checkpoint)


SPOILED_CONFIGS = [a_config_that_is_cut, a_config_without_its_end, an_empty_config, a_config_of_other_bytes]
# What lies in the run's folder, and what the refusal says.
DAMAGED: list[tuple[Callable[[Path], None], str]] = [
    (a_flipped_bit, "ep0-ba2-rank0.pt: .*damaged"),
    (a_file_for_the_tokenizer, "tokenizer is a file, and the run writes a folder there"),
    (a_folder_for("latest-rank0.pt"), "latest-rank0.pt is a folder, and the run makes a link there"),
    (a_folder_for("metrics.jsonl"), "metrics.jsonl is a folder, and the run writes a file there"),
    (a_folder_for("config.yaml"), "config.yaml is a folder, and the run writes a file there"),
    (a_folder_for("report.png"), "report.png is a folder, and the run writes a file there"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGED)
def test_a_start_that_a_damaged_folder_refuses_changes_nothing_in_it(
    run: Callable[..., Path], stopped: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(stopped)
    before = content(stopped)
    with pytest.raises(MPTFoundryError, match=f"(?s){said}"):
        run(stopped.name)
    assert content(stopped) == before


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(
    run: Callable[..., Path], stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(stopped)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 1 << 20))
    with pytest.raises(CheckpointError, match=r"a checkpoint takes .* bytes, and 1,048,576 are free"):
        run(stopped.name)
    assert content(stopped) == before


@pytest.mark.parametrize(
    ("error", "event"),
    some_of(
        itertools.product(
            [RunStopped("SIGTERM"), ConfigError("no"), KeyboardInterrupt()],
            ["init", "before_load", "after_load"],
        )
    ),
    ids=repr,
)
def test_whatever_ends_a_start_while_it_is_built_changes_nothing(
    run: Callable[..., Path],
    stopped: Path,
    monkeypatch: pytest.MonkeyPatch,
    event: str,
    error: BaseException,
) -> None:
    before = content(stopped)
    monkeypatch.setitem(build.CALLBACKS, "lr_monitor", lambda: Fails(event, error))
    with pytest.raises(type(error)):
        run(stopped.name, "callbacks={lr_monitor: {}}", "loggers={tensorboard: {}}")
    assert content(stopped) == before


def test_the_original_command_continues_after_an_allowed_change_that_was_killed_before_its_first_step(
    run: Callable[..., Path], whole: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = (stopped / "config.yaml").read_text()
    monkeypatch.setitem(build.CALLBACKS, "lr_monitor", lambda: Fails("batch_start", KeyboardInterrupt()))
    changed = ["global_train_batch_size=4", "allow_changes=[global_train_batch_size]"]
    with pytest.raises(KeyboardInterrupt):
        run(stopped.name, *changed, "callbacks={lr_monitor: {}}")
    assert (stopped / "config.yaml").read_text() == config
    run(stopped.name)
    assert losses(stopped) == losses(whole)


def test_the_config_is_that_of_the_newest_checkpoint(run: Callable[..., Path], stopped: Path) -> None:
    run(stopped.name, "optimizer.lr=0.01", "allow_changes=[optimizer.lr]")
    assert load_train_config(stopped / "config.yaml")[0].optimizer.lr == 0.01
    with pytest.raises(ConfigError, match=r"optimizer.lr: 0.01 in the run of .*, 0.001 here"):
        run(stopped.name, "max_duration=5ba")


def no_config(folder: Path) -> None:
    (folder / "config.yaml").unlink()


def a_config_of_another_seed(folder: Path) -> None:
    file = folder / "config.yaml"
    file.write_text(file.read_text().replace("seed: 17", "seed: 18"))


@pytest.mark.parametrize("damage", some_of([no_config, *SPOILED_CONFIGS, a_config_of_another_seed]))
def test_a_config_that_is_lost_or_damaged_is_the_checkpoints_again(
    run: Callable[..., Path],
    whole: Path,
    stopped: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
) -> None:
    config = (stopped / "config.yaml").read_text()
    damage(stopped)
    before = content(stopped)
    with pytest.raises(ConfigError, match=r"seed: 17 in the run of .*, 18 here"):
        run(stopped.name, "seed=18")
    with pytest.raises(CheckpointError, match="holds checkpoints of another model"):
        run(stopped.name, "model.d_model=64")
    assert content(stopped) == before
    monkeypatch.setitem(build.CALLBACKS, "lr_monitor", lambda: Fails("batch_start", KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run(stopped.name, "callbacks={lr_monitor: {}}")
    assert "config.yaml is not the checkpoint's config, which replaces it" in capsys.readouterr().out
    assert (stopped / "config.yaml").read_text() == config


def test_where_nothing_tells_the_config_of_an_older_checkpoint_that_is_said(
    run: Callable[..., Path], whole: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without_notes(stopped)
    (stopped / "config.yaml").unlink()
    run(stopped.name)
    assert "config, data and tokenizer: not compared" in capsys.readouterr().out
    assert losses(stopped) == losses(whole) and (stopped / "config.yaml").is_file()


@pytest.mark.parametrize("damage", SPOILED_CONFIGS)
def test_a_damaged_config_of_an_older_checkpoint_refuses_the_start(
    run: Callable[..., Path], stopped: Path, damage: Callable[[Path], None]
) -> None:
    without_notes(stopped)
    damage(stopped)
    before = content(stopped)
    with pytest.raises(ConfigError, match=r"config.yaml is damaged .* remove it to continue"):
        run(stopped.name)
    assert content(stopped) == before


def test_a_folder_that_is_removed_while_the_run_trains_is_made_again_and_the_run_ends_well(
    run: Callable[..., Path],
    whole: Path,
    stopped: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Removes(Callback):
        def batch_start(self, state: State, logger: Logger) -> None:
            if state.timestamp.batch == 3:
                shutil.rmtree(stopped)

    monkeypatch.setitem(build.CALLBACKS, "lr_monitor", Removes)
    run(stopped.name, "callbacks={lr_monitor: {}}")
    assert "was removed during training, and is created again" in capsys.readouterr().out
    assert {"config.yaml", "tokenizer", "ep0-ba4-rank0.pt", "latest-rank0.pt"} <= {
        p.name for p in stopped.iterdir()
    }
    assert losses(stopped) == losses(whole)[3:]
    assert not (stopped / ".lock").exists()


def test_a_finished_run_that_has_lost_its_metrics_is_still_finished(
    run: Callable[..., Path], whole: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(stopped.name)
    (stopped / "metrics.jsonl").unlink()
    run(stopped.name)
    printed = capsys.readouterr().out
    assert "is finished: 4 batches are done" in printed and "report: left out (" in printed


def finetuning(tiny_runs: Path, records: list[dict[str, str]]) -> Path:
    """The same run on records of its own."""
    folder = tiny_runs.parent / "finetuning"
    folder.mkdir(exist_ok=True)
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = yaml.safe_load(tiny_runs.read_text())
    dataset = {"local": f"{folder}/records.jsonl", "cache_folder": f"{folder}/cache"}
    config["train_loader"] = {"name": "finetuning", "num_workers": 0, "dataset": dataset}
    (folder / "finetuning.yaml").write_text(yaml.safe_dump(config))
    return folder / "finetuning.yaml"


def test_a_start_that_ends_while_it_tokenizes_leaves_no_folder(tiny_runs: Path) -> None:
    path = finetuning(tiny_runs, [{"prompt": "a", "response": "b"}] * 9 + [{"prompt": "a", "answer": "b"}])
    with pytest.raises(DataError):
        train(load_train_config(path, [*WORDS, "run_name=untokenized"])[0])
    assert not (tiny_runs.parent / "untokenized").exists()


def test_a_text_loader_does_not_continue_the_checkpoint_of_a_finetuning_loader(tiny_runs: Path) -> None:
    path = finetuning(tiny_runs, [{"prompt": f"Say {n}.", "response": f"{n}"} for n in range(64)])
    train(load_train_config(path, [*WORDS, "run_name=tuned"])[0])
    before = content(tiny_runs.parent / "tuned")
    words = [*WORDS, "run_name=tuned", "allow_changes=[train_loader]", "max_duration=9ba"]
    with pytest.raises(
        DataError, match=r"another kind of loader saved the checkpoint's position in the data"
    ):
        train(load_train_config(tiny_runs, words)[0])
    assert content(tiny_runs.parent / "tuned") == before
