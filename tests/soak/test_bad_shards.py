"""A shard that can't be read ends a launched run on every rank, with its name and reason: never quietly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mptfoundry.data.prepare.prepare import prepare

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    (
        "a data shard is damaged, cut or missing",
        "1 and 2 ranks, 0 and 2 workers, 8 runs",
        "every rank ends, the error names the shard, exit code 1",
    ),
]


@pytest.fixture
def many_shards(shards: Path, tmp_path: Path) -> Path:
    """Stream `a` in many shards."""
    options: dict[str, Any] = {"tokenizer": str(shards / "tokenizer"), "max_seq_len": 32, "workers": 1}
    prepare([str(shards / "a.jsonl")], tmp_path / "many", shard_bytes=800, progress=False, **options)
    assert len(list((tmp_path / "many" / "train").glob("*.mds"))) > 10
    return tmp_path / "many"


def damage(folder: Path) -> str:
    path = sorted(folder.glob("train/*.mds"))[-2]
    data = bytearray(path.read_bytes())
    data[-5] ^= 8
    path.write_bytes(data)
    return f"{path.name} is damaged: its xxh64 is not what its index says"


def lose(folder: Path) -> str:
    path = sorted(folder.glob("train/*.mds"))[-2]
    path.unlink()
    return f"{path.name} can't be fetched: No such file or directory"


def set_up(tiny_run: Path, loader: str, dataset: dict[str, Any]) -> None:
    config = yaml.safe_load(tiny_run.read_text())
    if loader == "eval_loader":
        config["eval_loader"] = {"name": "text", "dataset": dataset}
        config["eval_interval"] = "4ba"
    else:
        config["train_loader"]["dataset"] = {**dataset, "num_canonical_nodes": 2}
    config["max_duration"] = "2ep"
    tiny_run.write_text(yaml.safe_dump(config))


@pytest.mark.parametrize(
    ("fault", "loader", "ranks", "workers"),
    [
        *((damage, "train_loader", ranks, workers) for ranks in (1, 2) for workers in (0, 2)),
        *((lose, "train_loader", 2, workers) for workers in (0, 2)),
        (damage, "eval_loader", 1, 2),
        (damage, "eval_loader", 2, 0),
    ],
)
def test_a_bad_shard_ends_a_launched_run_with_its_name(
    tiny_run: Path,
    launch: Callable[..., Any],
    many_shards: Path,
    tmp_path: Path,
    fault: Callable[[Path], str],
    loader: str,
    ranks: int,
    workers: int,
) -> None:
    message = fault(many_shards)
    dataset: dict[str, Any] = {"local": str(many_shards), "split": "train"}
    if fault is lose:
        dataset = {"remote": str(many_shards), "local": str(tmp_path / "cache"), "split": "train"}
    set_up(tiny_run, loader, dataset | {"download_retry": 1})
    run = launch(
        tiny_run, "run_name=bad", f"{loader}.num_workers={workers}", ranks=ranks, launcher=workers > 0
    )
    assert run.wait() == 1, run.printed
    assert run.printed.count(message) in range(1, 3 * ranks), run.printed
    assert "Traceback" not in run.printed and "error: " in run.printed, run.printed
