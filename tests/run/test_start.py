"""Whatever a stopped run left, the next start goes on from the newest whole checkpoint, or says why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mptfoundry.config.load import load_train_config
from mptfoundry.errors import CheckpointError, ConfigError
from mptfoundry.run.metrics_file import read_rows
from mptfoundry.run.start import resolve_start
from tests.conftest import losses
from tests.runs import run, stopped, whole

__all__ = ["run", "stopped", "whole"]

pytestmark = pytest.mark.long

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    ("the newest checkpoint was cut short", "at 6 lengths", "passed over; bitwise from the one before"),
    (
        "the newest checkpoint holds a flipped bit",
        "5 places in a file",
        "an error names it; from the one before on request, bitwise",
    ),
    (
        "all checkpoints are damaged; all are unfinished",
        "flipped; cut",
        "an error; starts from the beginning",
    ),
    ("the `latest` link is missing, dangling or old", "3", "the link is ignored"),
    ("a killed save left files", "a file and a folder", "removed"),
    ("the batch size was changed, when allowed", "8 to 4 and 12; 2 workers", "continues at the same sample"),
]

WORDS = ["max_duration=9ba", "log_to_console=false"]
Damage = Callable[[Path], None]


def weights(folder: Path, batch: int = 9) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"ep0-ba{batch}-rank0.pt", weights_only=False)["state"]["model"]  # type: ignore[no-any-return]


def start_of(tiny_runs: Path, folder: Path, *words: str) -> Path | None:
    """What the run in `folder` would go on from."""
    given, _ = load_train_config(tiny_runs, [*WORDS, f"run_name={folder.name}", *words])
    with resolve_start(given) as start:
        assert start.is_own or start.checkpoint is None
        return start.checkpoint


def cut_to(share: float) -> Damage:
    def cut(file: Path) -> None:
        os.truncate(file, int(file.stat().st_size * share))

    return cut


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)


def flip_at(share: float) -> Damage:
    return lambda file: flip(file, int(file.stat().st_size * share))


def flip_in(text: bytes) -> Damage:
    return lambda file: flip(file, file.read_bytes().rindex(text) + len(text) - 1)


@pytest.mark.parametrize("share", [0, 1e-5, 0.1, 0.5, 0.9, 0.9999])
def test_a_checkpoint_that_was_cut_is_passed_over_and_named(
    tiny_runs: Path, stopped: Path, capsys: pytest.CaptureFixture[str], share: float
) -> None:
    cut_to(share)(stopped / "ep0-ba6-rank0.pt")
    assert start_of(tiny_runs, stopped) == stopped / "ep0-ba3-rank0.pt"
    assert f"{stopped}/ep0-ba6-rank0.pt: damaged or cut short" in capsys.readouterr().out


def test_after_a_cut_checkpoint_the_run_is_the_one_that_was_never_stopped(
    whole: Path, stopped: Path, run: Callable[..., Path]
) -> None:
    cut_to(0.7)(stopped / "ep0-ba6-rank0.pt")
    run(stopped.name)
    assert losses(stopped) == losses(whole)
    for batch in (6, 9):
        one, other = weights(whole, batch), weights(stopped, batch)
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "damage",
    [flip_at(0.5), flip_at(0.2), flip_in(b"state"), flip_in(b"PK\1\2"), flip_in(b"data.pkl")],
    ids=["numbers", "more-numbers", "outline", "directory", "name"],
)
def test_a_flipped_bit_is_named_and_the_one_before_is_taken_on_request(
    tiny_runs: Path, stopped: Path, capsys: pytest.CaptureFixture[str], damage: Damage
) -> None:
    damage(stopped / "ep0-ba6-rank0.pt")
    with pytest.raises(
        CheckpointError, match=rf"{stopped}/ep0-ba6-rank0.pt: .*damaged.*resume_past_damage=true"
    ):
        start_of(tiny_runs, stopped)
    found = start_of(tiny_runs, stopped, "resume_past_damage=true")
    assert found == stopped / "ep0-ba3-rank0.pt"
    assert "passed over, as resume_past_damage says" in capsys.readouterr().out


def test_past_a_damaged_checkpoint_the_run_is_the_one_that_was_never_stopped(
    whole: Path, stopped: Path, run: Callable[..., Path]
) -> None:
    flip_at(0.5)(stopped / "ep0-ba6-rank0.pt")
    run(stopped.name, "resume_past_damage=true")
    assert losses(stopped) == losses(whole)
    for batch in (6, 9):
        one, other = weights(whole, batch), weights(stopped, batch)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tiny_runs: Path, stopped: Path) -> None:
    for file in stopped.glob("ep0*"):
        flip(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints in .* is whole"):
        start_of(tiny_runs, stopped, "resume_past_damage=true")


def test_a_run_that_has_only_unfinished_checkpoints_begins_anew(
    whole: Path, stopped: Path, run: Callable[..., Path]
) -> None:
    for file in stopped.glob("ep0*"):
        cut_to(0.5)(file)
    run(stopped.name)
    assert losses(stopped) == losses(whole)


@pytest.mark.parametrize("target", [None, "ep0-ba9-rank0.pt", "ep0-ba3-rank0.pt"])
def test_no_link_is_believed(tiny_runs: Path, stopped: Path, target: str | None) -> None:
    (stopped / "latest-rank0.pt").unlink()
    if target:
        (stopped / "latest-rank0.pt").symlink_to(target)
    assert start_of(tiny_runs, stopped) == stopped / "ep0-ba6-rank0.pt"


def test_what_a_killed_run_left_unfinished_is_removed(
    stopped: Path, run: Callable[..., Path], whole: Path
) -> None:
    left = [stopped / ".ep0-ba9-rank0.pt.elsewhere.17.part", stopped / ".ep0-ba9.elsewhere.17.old.part"]
    left[0].write_bytes(b"half")
    left[1].mkdir()
    run(stopped.name)
    assert not any(path.exists() for path in left)
    assert losses(stopped) == losses(whole)


def test_a_finished_run_can_be_lengthened_and_its_changes_are_shown(
    stopped: Path, run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run(stopped.name, "max_duration=7ba", "save_interval=1ba", "eval_interval=2ba")
    printed = capsys.readouterr().out
    assert "config: changed since the checkpoint" in printed
    for line in ("eval_interval: 1 -> 2ba", "max_duration: 9ba -> 7ba", "save_interval: 3ba -> 1ba"):
        assert f"  {line}\n" in printed
    assert len(losses(stopped)) == 7


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("global_train_batch_size=4", "global_train_batch_size: 8 in the run of .*, 4 here"),
        ("seed=18", "seed: 17 in the run of"),
        (
            "train_loader.dataset.streams.a.proportion=0.5",
            "streams.a.proportion: 0.75 in the run of .*, 0.5 here",
        ),
        ("train_loader.dataset.streams.b=null", "train_loader.dataset.streams.b.local: .* not given here"),
        ("optimizer.lr=0.1", "optimizer.lr: 0.001 in the run of"),
        ("model.resid_pdrop=0", "model.resid_pdrop: 0.1 in the run of"),
    ],
)
def test_what_would_silently_make_another_run_is_refused(
    tiny_runs: Path, stopped: Path, word: str, key: str
) -> None:
    before = (stopped / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=rf"(?s){key}.*allow_changes=\["):
        start_of(tiny_runs, stopped, word)
    assert (stopped / "config.yaml").read_text() == before
    name = word.split("=")[0].split(".")[0]
    assert start_of(tiny_runs, stopped, word, f"allow_changes=[{name}]") == stopped / "ep0-ba6-rank0.pt"


def seen(folder: Path, run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, *words: str) -> list[int]:
    """The samples that a run learns from, in their order."""
    from mptfoundry.callbacks.throughput import Throughput

    samples: list[int] = []
    with monkeypatch.context() as patch:
        note: Any = lambda _, state, logger: samples.extend(state.batch["sample_id"].tolist())  # noqa: E731
        patch.setattr(Throughput, "before_forward", note, raising=False)
        run(folder.name, *words)
    return samples


@pytest.mark.parametrize(("size", "workers"), [(4, 0), (12, 0), (4, 2)])
def test_another_batch_size_goes_on_from_the_same_sample(
    whole: Path,
    stopped: Path,
    run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    workers: int,
) -> None:
    every = seen(whole.parent / f"every-{size}-{workers}", run, monkeypatch)
    words = [
        f"global_train_batch_size={size}",
        "max_duration=72sp",
        "allow_changes=[global_train_batch_size]",
    ]
    rest = seen(stopped, run, monkeypatch, *words, f"train_loader.num_workers={workers}")
    assert len(every) == 72 and rest == every[48:]
    samples = [row["samples"] for row in read_rows(stopped / "metrics.jsonl")]
    assert samples[6:] == list(range(48 + size, 73, size))


def test_another_learning_rate_that_is_allowed_is_taken(stopped: Path, run: Callable[..., Path]) -> None:
    run(stopped.name, "optimizer.lr=2e-3", "allow_changes=[optimizer.lr]", "max_duration=9ba")
    rates = [row["lr"] for row in read_rows(stopped / "metrics.jsonl")]
    usual = [row["lr"] for row in read_rows(stopped.parent / "whole" / "metrics.jsonl")]
    assert rates[:6] == usual[:6]
    assert rates[6:] == pytest.approx([2 * rate for rate in usual[6:]])


def test_a_load_path_may_name_a_run(whole: Path, run: Callable[..., Path]) -> None:
    other = run(
        "other", f"load_path={whole}", "load_weights_only=true", "max_duration=1ba", "save_interval=1ba"
    )
    names = {path.name for path in other.glob("*.pt")}
    assert names == {"ep0-ba1-rank0.pt", "latest-rank0.pt"}
    assert losses(other)[0] < losses(whole)[0] - 0.5


HOLDS = """
import sys, time
from pathlib import Path
from mptfoundry.run.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_a_folder_is_refused_and_a_dead_one_is_no_obstacle(
    stopped: Path, run: Callable[..., Path]
) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(stopped)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(
            CheckpointError, match=rf"{stopped} is in use by the run of process {other.pid} on "
        ):
            run(stopped.name)
        other.kill()
        other.wait()
    assert json.loads((stopped / ".lock").read_text())["pid"] == other.pid
    run(stopped.name)
    assert len(losses(stopped)) == 9


def test_a_start_from_nothing_replaces_no_checkpoint_unasked(stopped: Path, run: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"ep0-ba6-rank0.pt is further than this start, batch 0"):
        run(stopped.name, "autoresume=false")
    run(stopped.name, "save_overwrite=true", "max_duration=3ba")
    assert len(losses(stopped)) == 3
