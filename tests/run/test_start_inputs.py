"""A start whose data, tokenizer or config is not what its checkpoint remembers is refused, unwritten."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mptfoundry.config.load import load_train_config, to_yaml
from mptfoundry.errors import ConfigError
from mptfoundry.run.start import resolve_start
from mptfoundry.train import train
from tests.conftest import losses, tiny_run_in

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    ("data or tokenizer were changed in place", "swapped, edited, 4", "refused, nothing is written"),
]

RUN = ["max_duration=2ba", "save_interval=1ba", "log_to_console=false", "run_name=run"]


@pytest.fixture(scope="module")
def config(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a run of two batches, with streams and a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(shards, folder / "data")
    return tiny_run_in(folder, folder / "data")


@pytest.fixture(scope="module")
def trained(config: Path) -> Path:
    """The folder of that run after one batch."""
    train(load_train_config(config, [*RUN, "max_duration=1ba"])[0])
    return config.parent / "run"


@pytest.fixture
def stopped(trained: Path) -> Iterator[Path]:
    """The same, put back as it was."""
    kept = trained.with_name("kept")
    shutil.copytree(trained, kept, symlinks=True)
    yield trained
    shutil.rmtree(trained)
    kept.rename(trained)


@pytest.fixture
def swapped(config: Path) -> Iterator[None]:
    """The two streams' folders have each other's names."""

    def swap() -> None:
        data = config.parent / "data"
        (data / "a").rename(data / "x")
        (data / "b").rename(data / "a")
        (data / "x").rename(data / "b")

    swap()
    yield
    swap()


def content_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path): path.read_bytes() for path in files}


def start(config: Path, *words: str) -> None:
    train(load_train_config(config, [*RUN, *words])[0])


def look_for_start(config: Path, *words: str) -> None:
    with resolve_start(load_train_config(config, [*RUN, *words])[0]) as found:
        assert found.is_own


def test_swapped_streams_are_refused_before_anything_is_written_and_taken_when_allowed(
    config: Path, stopped: Path, swapped: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content_of(stopped)
    with pytest.raises(ConfigError) as refused:
        start(config)
    lines = str(refused.value).splitlines()
    keys = [f"train_loader.dataset.streams.{name}" for name in "ab"]
    said = f": its content is not what the run of {stopped} read (fingerprint "
    assert [line.split(said)[0] for line in lines[:2]] == keys
    assert lines[2].endswith(f"or set allow_changes=[{','.join(keys)}].")
    assert content_of(stopped) == before
    start(config, "allow_changes=[train_loader.dataset.streams]")
    assert f"  {keys[0]}: its content has changed (" in capsys.readouterr().out
    assert len(losses(stopped)) == 2


def test_two_ids_that_were_swapped_in_the_tokenizer_are_refused(config: Path, stopped: Path) -> None:
    file = config.parent / "data" / "tokenizer" / "tokenizer.json"
    kept, before = file.read_text(), content_of(stopped)
    tokenizer = json.loads(kept)
    vocab = tokenizer["model"]["vocab"]
    one, other = list(vocab)[20:22]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    file.write_text(json.dumps(tokenizer))
    try:
        with pytest.raises(ConfigError, match=r"^tokenizer: its content .*\n.*allow_changes=\[tokenizer\]"):
            start(config)
        assert content_of(stopped) == before
    finally:
        file.write_text(kept)


def test_the_checkpoints_config_counts_whatever_the_folder_says(
    config: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = "seed: 17 in the run of .*, 18 here"
    (stopped / "config.yaml").unlink()
    look_for_start(config)
    with pytest.raises(ConfigError, match=other):
        look_for_start(config, "seed=18")
    # As a start leaves it that was allowed another seed and was killed before its first step.
    given, _ = load_train_config(config, [*RUN, "seed=18"])
    (stopped / "config.yaml").write_text(written := to_yaml(given))
    look_for_start(config)
    with pytest.raises(ConfigError, match=other):
        look_for_start(config, "seed=18")
    assert (stopped / "config.yaml").read_text() == written


def test_with_an_older_checkpoint_it_is_said_that_there_is_nothing_to_compare_with(
    config: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = stopped / "ep0-ba1-rank0.pt"
    content = torch.load(checkpoint, weights_only=False)
    del content["run"]
    torch.save(content, checkpoint)
    look_for_start(config)
    assert (
        "data and tokenizer: not compared, since an older version wrote the checkpoint"
        in capsys.readouterr().out
    )
    with pytest.raises(ConfigError, match="seed: 17 in the run of"):
        look_for_start(config, "seed=18")
