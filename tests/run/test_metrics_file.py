"""metrics.jsonl: what a row holds, and that a resumed run has each batch once."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from composer import Callback, Trainer

from mptfoundry.callbacks.throughput import Throughput
from mptfoundry.errors import CheckpointError, ConfigError
from mptfoundry.mpt.config import MPTConfig
from mptfoundry.run.metrics_file import MEASURED, MetricsFile, cut_rows, read_rows
from mptfoundry.run.report import describe
from tests.fuzz import damaged_bytes, odd_values

MakeTrainer = Callable[..., Trainer]
SmallFiles = Callable[[int], AbstractContextManager[None]]


class Stop(Callback):
    """Ends the process's training as a kill would: nothing after this batch's checkpoint happens."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def batch_end(self, state: object, logger: object) -> None:
        if state.timestamp.batch == self.batch:  # type: ignore[attr-defined]
            raise KeyboardInterrupt


def test_a_batch_is_a_row_and_an_evaluation_is_a_row(
    make_trainer: MakeTrainer, config: MPTConfig, tmp_path: Path
) -> None:
    trainer = make_trainer(
        max_duration="4ba",
        with_eval=True,
        eval_interval="4ba",
        loggers=[MetricsFile(tmp_path / "run")],
        callbacks=[Throughput(config, peak_flops=1e12)],
    )
    trainer.fit()
    trainer.close()
    *batches, evaluation = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["batch"] for row in batches] == [1, 2, 3, 4]
    assert [row["tokens"] for row in batches] == [32, 64, 96, 128]
    assert [row["samples"] for row in batches] == [4, 8, 12, 16]
    assert [row["lr"] for row in batches] == [0.0, 0.0, 0.005, 0.01]
    for row in batches:
        assert 0 < row["loss"] < 10
        assert all(row[name] > 0 for name in MEASURED if name != "eta_seconds")
        assert row["mfu_causal"] < row["mfu"]
    assert [row["eta_seconds"] > 0 for row in batches] == [True, True, True, False]
    assert set(evaluation["eval"]) == {"held_out"}
    scores = evaluation["eval"]["held_out"]
    assert scores["tokens"] == 24 * 7
    assert set(scores) == {
        "LanguageCrossEntropy",
        "LanguagePerplexity",
        "TokenAccuracy",
        "tokens",
        "bits_per_byte",
    }
    assert evaluation["batch"] == 4


def test_a_resumed_run_has_each_batch_once(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    saving = {"save_folder": str(folder), "save_interval": "2ba", "autoresume": True, "run_name": "run"}
    killed = make_trainer(max_duration="6ba", loggers=[MetricsFile(folder)], callbacks=[Stop(5)], **saving)
    with pytest.raises(KeyboardInterrupt):
        killed.fit()
    killed.close()
    assert [row["batch"] for row in read_rows(folder / "metrics.jsonl")] == [1, 2, 3, 4]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"batch": 5, "loss": 1.0}\n{"batch": 6, "lo')
    resumed = make_trainer(max_duration="6ba", loggers=[MetricsFile(folder)], **saving)
    resumed.fit()
    resumed.close()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["batch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all("tokens" in row for row in rows)


def test_cutting_keeps_what_came_before_and_drops_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"batch": 1}\n{"batch": 1, "eval": {}}\n{"batch": 2}\nnot json\n{"batch": 3')
    assert [row["batch"] for row in read_rows(path)] == [1, 1, 2]
    cut_rows(path, last_batch=2)
    assert path.read_text() == '{"batch": 1}\n{"batch": 1, "eval": {}}\n{"batch": 2}\n'
    cut_rows(path, last_batch=1)
    assert path.read_text() == '{"batch": 1}\n{"batch": 1, "eval": {}}\n'
    cut_rows(path, last_batch=0)
    assert path.read_text() == ""


def test_a_line_with_a_byte_that_is_no_text_is_left_out_and_the_others_stay_as_they_are(
    tmp_path: Path,
) -> None:
    path = tmp_path / "metrics.jsonl"
    good = [
        b'{"batch": 1, "tokens": 8, "loss": 2.0, "note": "\xe8\xa8\x80"}\n',
        b'{"batch": 2, "tokens": 16, "loss": 1.0}\n',
    ]
    bad = [
        b'{"batch": 1, "note": "\xff"}\n',
        b"[" * 100_000 + b"\n",
        b"\x00" * 9 + b"\n",
    ]
    partial = b'{"batch": 2, "loss": 1.0}\n'
    path.write_bytes(good[0] + b"".join(bad) + partial + good[1])
    assert [row["loss"] for row in read_rows(path)] == [2.0, 1.0]
    cut_rows(path, last_batch=2)
    assert path.read_bytes() == good[0] + partial + good[1]


def test_whatever_a_disk_does_to_the_rows_they_are_read_cut_and_reported(tmp_path: Path) -> None:
    row = {"batch": 1, "tokens": 8, "seconds": 0.5, "loss": 2.0, "lr": 1e-4, "grad_norm": 1.0, "mfu": None}
    evaluation = {"batch": 2, "tokens": 16, "eval": {"held_out": {"LanguageCrossEntropy": 2.5, "tokens": 9}}}
    rows = [row, {**row, "batch": 2, "tokens": 16}, evaluation]
    good = "".join(json.dumps(each) + "\n" for each in rows).encode()
    odd = ((what, json.dumps(each).encode() + b"\n") for what, each in odd_values(rows, seed=1, count=60))
    odd = ((what, line.replace(b"}, {", b"}\n{").strip(b"[]\n") + b"\n") for what, line in odd)
    path = tmp_path / "metrics.jsonl"
    for _what, data in [*damaged_bytes(good, seed=1, count=90), *odd]:
        path.write_bytes(data)
        kept = list(read_rows(path))
        batches = [each for each in kept if "loss" in each and each.get("seconds") is not None]
        if batches:
            describe(tmp_path, batches, [each for each in kept if "eval" in each and each.get("tokens")], {})
        cut_rows(path, last_batch=1)
        assert list(read_rows(path)) == [each for each in kept if each["batch"] <= 1]


def test_rows_that_cannot_be_cut_stay_as_they_are(tmp_path: Path, small_files: SmallFiles) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"batch": 1}\n{"batch": 2}\n')
    with small_files(5), pytest.raises(CheckpointError, match=r"metrics.jsonl: can't be written \(File too"):
        cut_rows(path, last_batch=1)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == '{"batch": 1}\n{"batch": 2}\n'


def test_a_disk_that_is_full_ends_the_run_with_its_name(
    make_trainer: MakeTrainer, tmp_path: Path, small_files: SmallFiles
) -> None:
    trainer = make_trainer(loggers=[MetricsFile(tmp_path)])
    with small_files(450):
        with pytest.raises(ConfigError, match=f"save_folder: {tmp_path} can't be written to: File too large"):
            trainer.fit()
        trainer.close()
    assert [row["batch"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1]


def test_what_is_not_finite_is_written_as_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    file.write({"batch": 1, "loss": float("nan"), "other": [float("inf"), 1]})
    assert file.path.read_text() == '{"batch": 1, "loss": null, "other": [null, 1]}\n'


def test_a_table_becomes_a_list_of_objects(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    file.log_table(["prompt", "generation"], [["a", "b"]], name="generations", step=3)
    (row,) = read_rows(file.path)
    assert row == {"batch": 3, "generations": [{"prompt": "a", "generation": "b"}]}


@pytest.mark.parametrize("place", ["a file", "/proc"])
def test_a_folder_that_cannot_be_written_is_refused_before_training(
    make_trainer: MakeTrainer, tmp_path: Path, place: str
) -> None:
    (tmp_path / "a file").write_text("")
    folder = tmp_path / place / "run"
    with pytest.raises(ConfigError, match=f"save_folder: {folder} can't be written to"):
        make_trainer(loggers=[MetricsFile(folder)])
