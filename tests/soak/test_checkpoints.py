"""Killed while it writes a checkpoint, or started with other ranks, a run goes on as if nothing had been."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import losses

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    (
        "killed while a checkpoint is written",
        "SIGKILL at 0, 30, 90 % of its bytes; whole, and shards of 2 ranks",
        "the same",
    ),
    (
        "killed, and resumed on another number of ranks",
        "2, 1, 2 ranks",
        "the same samples; losses equal within rounding",
    ),
]

# 25 MB a checkpoint, so that its writing takes long enough to be met.
LARGE = ["model.d_model=256", "model.n_layers=4"]
SHARDED = "fsdp_config={state_dict_type: sharded}"


def size_of(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def kill_when(run: Any, is_time: Callable[[], bool]) -> bool:
    """Kill all of a run at once when it is time; whether it came to that."""
    while run.process.poll() is None:
        try:
            if is_time():
                run.kill_all()
                return True
        except OSError:  # renamed meanwhile
            continue
        time.sleep(0.0005)
    return False


def is_written(folder: Path, batch: int, least: int) -> Callable[[], bool]:
    """Whether `least` bytes of a batch's checkpoint lie under its temporary name."""
    return lambda: any(size_of(part) >= least for part in folder.glob(f".ep0-ba{batch}*.part"))


@pytest.mark.parametrize(("ranks", "words"), [(1, LARGE), (2, [*LARGE, SHARDED])], ids=["whole", "sharded"])
def test_killed_while_it_writes_a_run_has_the_losses_of_one_that_was_not(
    tiny_run: Path, launch: Callable[..., Any], tmp_path: Path, ranks: int, words: list[str]
) -> None:
    whole = launch(tiny_run, "run_name=whole", *words, ranks=ranks)
    assert whole.wait() == 0, whole.printed
    folder, met = tmp_path / "killed", 0
    full = size_of(next((tmp_path / "whole").glob("ep0-ba12*")))
    for batch, share in ((3, 0), (6, 0.3), (9, 0.9)):
        run = launch(tiny_run, "run_name=killed", *words, ranks=ranks)
        met += kill_when(run, is_written(folder, batch, int(share * full)))
        assert not folder.exists() or not list(folder.glob(f"ep0-ba{batch}*")) or run.process.returncode != 0
    assert met >= 1
    last = launch(tiny_run, "run_name=killed", *words, ranks=ranks)
    assert last.wait() == 0, last.printed
    assert losses(folder) == losses(tmp_path / "whole")
    assert not list(folder.glob(".*.part"))


def test_another_number_of_ranks_has_the_same_losses_but_for_rounding(
    tiny_run: Path, launch: Callable[..., Any], tmp_path: Path
) -> None:
    words = ["model.resid_pdrop=0", SHARDED]
    whole = launch(tiny_run, "run_name=whole", *words)
    assert whole.wait() == 0, whole.printed
    folder = tmp_path / "moved"

    def has_rows(number: int) -> Callable[[], bool]:
        return lambda: (folder / "metrics.jsonl").is_file() and len(losses(folder)) >= number

    for ranks, stop_at in ((2, 4), (1, 8)):
        assert kill_when(launch(tiny_run, "run_name=moved", *words, ranks=ranks), has_rows(stop_at))
    last = launch(tiny_run, "run_name=moved", *words, ranks=2)
    assert last.wait() == 0, last.printed
    assert losses(folder) == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
