"""Exports during training: when, what, how many stay, and that training neither waits nor changes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.core import Callback

from mptfoundry.callbacks.hf_export import HFExport, exports_in
from mptfoundry.checkpoints.reading import load_network, open_model
from mptfoundry.checkpoints.torch_files import load_plain
from mptfoundry.errors import ConfigError
from mptfoundry.mpt.config import MPTConfig
from mptfoundry.mpt.network import MPT
from mptfoundry.run.atomic_checkpoints import AtomicCheckpoints
from mptfoundry.run.metrics_file import MetricsFile
from mptfoundry.run.resume import Resume
from tests.ranks import run_on_ranks

MakeTrainer = Callable[..., Trainer]
ROOT = Path(__file__).parents[2]


class Written:
    """Writes folders as far as the callback looks at them, and keeps what it was given."""

    def __init__(self) -> None:
        self.weights: dict[str, dict[str, torch.Tensor]] = {}
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def __call__(self, weights: dict[str, torch.Tensor], checkpoint: str, out: Path) -> None:
        assert self.may_go_on.wait(60)
        out.mkdir(parents=True)
        (out / "config.json").write_text("{}")
        self.weights[checkpoint] = weights


class Snapshots(Callback):
    """The weights at the end of each batch."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def batch_checkpoint(self, state: Any, logger: Any) -> None:
        copies = {name: value.clone() for name, value in state.model.model.state_dict().items()}
        self.weights[int(state.timestamp.batch)] = copies


class Patience(Callback):
    """Lets each export come to its end: these batches take less time than an export does."""

    def __init__(self, export: HFExport) -> None:
        self.export = export

    def batch_start(self, state: Any, logger: Any) -> None:
        self.export.wait()


@pytest.fixture
def make_export(config: MPTConfig, tmp_path: Path) -> Callable[..., HFExport]:
    names = frozenset(MPT(config, device="meta").state_dict())

    def make(write: Any, **options: Any) -> HFExport:
        folder = {"save_folder": str(tmp_path / "{run_name}"), "save_interval": "2ba"}
        return HFExport(write, tmp_path, names, **{**folder, **options})

    return make


def fit(make_trainer: MakeTrainer, *callbacks: Callback, **options: Any) -> Trainer:
    trainer = make_trainer(max_duration="5ba", run_name="mine", callbacks=list(callbacks), **options)
    trainer.fit()
    trainer.close()
    return trainer


def test_exports_hold_the_weights_of_their_batch(
    make_trainer: MakeTrainer, make_export: Callable[..., HFExport], tmp_path: Path
) -> None:
    write, snapshots = Written(), Snapshots()
    export = make_export(write, precision="bfloat16")
    fit(make_trainer, export, snapshots, Patience(export), loggers=[MetricsFile(tmp_path)])
    assert sorted(path.name for path in (tmp_path / "mine/huggingface").iterdir()) == ["ba2", "ba4", "ba5"]
    for checkpoint, weights in write.weights.items():
        expected = snapshots.weights[int(checkpoint.removeprefix("ep0-ba"))]
        assert list(weights) == list(expected)
        for name, tensor in weights.items():
            assert torch.equal(tensor, expected[name].to(torch.bfloat16))
    assert (tmp_path / "report.png").is_file()


def test_the_last_ones_stay(
    make_trainer: MakeTrainer, make_export: Callable[..., HFExport], tmp_path: Path
) -> None:
    mine = tmp_path / "mine" / "huggingface"
    for name in ("ba1", "ba10-kept", "ba1x"):
        (mine / name).mkdir(parents=True)
        (mine / name / "config.json").touch()
    export = make_export(Written(), num_checkpoints_to_keep=2)
    fit(make_trainer, export, Patience(export))
    assert sorted(path.name for path in mine.iterdir()) == ["ba10-kept", "ba1x", "ba4", "ba5"]
    assert [path.name for path in exports_in(mine, "ba{batch}")] == ["ba5", "ba4"]
    assert [path.name for path in exports_in(mine, "ba{batch}-{run_name}")] == ["ba10-kept"]


def test_training_goes_on_while_an_export_is_written(
    make_trainer: MakeTrainer, make_export: Callable[..., HFExport], caplog: pytest.LogCaptureFixture
) -> None:
    """The one at batch 4 finds that of batch 2 unfinished, and is left out; that of the end is waited for."""
    write = Written()
    write.may_go_on.clear()

    class Release(Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            if int(state.timestamp.batch) == 5:
                write.may_go_on.set()

    fit(make_trainer, make_export(write), Release())
    assert list(write.weights) == ["ep0-ba2", "ep0-ba5"]
    assert "that of batch 4 is left out" in caplog.text


def test_an_error_in_the_background_ends_the_run(
    make_trainer: MakeTrainer, make_export: Callable[..., HFExport]
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fit(make_trainer, make_export(fail, save_interval="5ba"))


@pytest.fixture
def interrupted(make_trainer: MakeTrainer, make_export: Callable[..., HFExport], tmp_path: Path) -> Path:
    """The checkpoint of batch 2 of a run whose export of that batch never came to its end."""

    def fail(weights: Any, checkpoint: str, out: Path) -> None:
        (out.parent / ".ba2.elsewhere.7.part").mkdir(parents=True)
        raise InterruptedError

    saver = AtomicCheckpoints(tmp_path, save_interval="2ba", in_background=False)
    with pytest.raises(InterruptedError):
        fit(make_trainer, make_export(fail, save_folder=str(tmp_path)), saver)
    assert (tmp_path / "huggingface").is_dir()
    return tmp_path / "ep0-ba2-rank0.pt"


def test_an_interrupted_export_is_made_by_the_next_start(
    make_trainer: MakeTrainer, make_export: Callable[..., HFExport], tmp_path: Path, interrupted: Path
) -> None:
    write = Written()
    export = make_export(write, save_folder=str(tmp_path))
    make_trainer(max_duration="2ba", callbacks=[export, Resume(interrupted)]).close()
    saved = load_plain(interrupted)["state"]["model"]
    assert list(write.weights) == ["ep0-ba2"]
    assert all(
        torch.equal(tensor, saved[f"model.{name}"]) for name, tensor in write.weights["ep0-ba2"].items()
    )
    assert [path.name for path in (tmp_path / "huggingface").iterdir()] == ["ba2"]
    assert not list(tmp_path.glob(".*.export"))


def test_an_interrupted_export_of_a_batch_that_is_over_is_named_once(
    make_trainer: MakeTrainer,
    make_export: Callable[..., HFExport],
    tmp_path: Path,
    interrupted: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / ".ba2.ep0-ba2.export").rename(tmp_path / ".ba1.ep0-ba1.export")
    copy = tmp_path / "ep0-ba1-rank0.pt"
    copy.write_bytes(interrupted.read_bytes())
    write = Written()
    for said in (True, False):
        export = make_export(write, save_folder=str(tmp_path))
        make_trainer(max_duration="2ba", callbacks=[export, Resume(interrupted)]).close()
        command = f"mptfoundry export {copy} {tmp_path}/huggingface/ba1 dtype=fp32"
        assert (command in capsys.readouterr().out) == said
    assert not write.weights and not list(tmp_path.glob(".*.export"))


def test_a_start_from_an_earlier_batch_exports_it_when_it_comes_to_it(
    make_trainer: MakeTrainer, make_export: Callable[..., HFExport], tmp_path: Path, interrupted: Path
) -> None:
    write = Written()
    export = make_export(write, save_folder=str(tmp_path))
    fit(make_trainer, export, Patience(export))
    assert list(write.weights) == ["ep0-ba2", "ep0-ba4", "ep0-ba5"]
    assert not list(tmp_path.glob(".*.export"))


def test_training_is_the_same_with_exports(
    make_trainer: MakeTrainer, make_export: Callable[..., HFExport]
) -> None:
    one, other = fit(make_trainer), fit(make_trainer, make_export(Written(), save_interval="1ba"))
    expected = other.state.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in one.state.model.state_dict().items())


def test_weights_that_are_no_mpts_are_refused_before_training(
    make_trainer: MakeTrainer, make_export: Callable[..., HFExport]
) -> None:
    export = make_export(Written())
    export.names = export.names - {"transformer.wte.weight"}
    with pytest.raises(ConfigError, match=r"weights are not an MPT's, such as transformer\.wte\.weight"):
        make_trainer(callbacks=[export])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"huggingface_folder_name": "last"}, "has to be one name with {batch} in it"),
        ({"num_checkpoints_to_keep": 0}, "keeps nothing"),
        ({"save_folder": "s3://b", "num_checkpoints_to_keep": 2}, "nothing is deleted from an object store"),
    ],
)
def test_what_would_lose_exports_is_refused(
    make_export: Callable[..., HFExport], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        make_export(Written(), **options)


def test_two_sharded_ranks_export_one_whole_model(tmp_path: Path) -> None:
    """FSDP2 over gloo, the real folder: it holds what the run's own checkpoint holds."""
    from mptfoundry.data.prepare.prepare import prepare
    from mptfoundry.tokenizer import train_bpe

    text = tmp_path / "text"
    text.mkdir()
    for number, file in enumerate(sorted((ROOT / "mptfoundry" / "mpt").glob("*.py"))):
        (text / f"{number}.txt").write_text(file.read_text())
    train_bpe([file.read_text() for file in text.iterdir()], 384, tmp_path / "tokenizer")
    prepare(
        [str(text)], tmp_path / "shards", tokenizer=str(tmp_path / "tokenizer"), max_seq_len=32, workers=1
    )
    words = {
        "tokenizer.name": tmp_path / "tokenizer",
        "max_seq_len": 32,
        "model.d_model": 32,
        "model.n_heads": 4,
        "model.vocab_size": 384,
        "train_loader.dataset.streams": "null",
        "train_loader.dataset.local": tmp_path / "shards",
        "eval_loader": "null",
        "callbacks": "{}",
        "callbacks.hf_checkpointer.save_folder": tmp_path / "run",
        "callbacks.hf_checkpointer.save_interval": "10ba",
        "fsdp_config": "{state_dict_type: sharded}",
        "max_duration": "2ba",
        "save_interval": "2ba",
        "save_folder": tmp_path / "run",
    }
    arguments = ["configs/mpt-tiny.yaml", *(f"{key}={value}" for key, value in words.items())]
    done = run_on_ranks("scripts/train.py", *arguments)
    assert done.returncode == 0, done.stdout
    source = open_model(tmp_path / "run")
    assert source.path.is_dir() and "ba2" in source.path.name
    exported, _ = load_network(tmp_path / "run" / "huggingface" / "ba2")
    found = exported.state_dict()
    for name, tensor in source.tensors():
        assert torch.equal(found[name], tensor)
    card = (tmp_path / "run" / "huggingface" / "ba2" / "README.md").read_text()
    assert "| batches | 2 |" in card and "](report.png)" in card
