"""A run that is killed at any moment and started again with the same command is the run that never was."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mptfoundry.run.metrics_file import read_rows
from tests.conftest import losses_by_batch

# Rows of docs/internals/reliability.md: the fault; how it is made, and how often; what the run does.
FAULTS = [
    (
        "all processes killed at a random step",
        "SIGKILL, 4 times on 1 and on 2 ranks",
        "the losses of a run that was not killed, bitwise",
    ),
]


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_random_steps_a_run_has_the_losses_of_one_that_was_not(
    tiny_run: Path, launch: Callable[..., Any], tmp_path: Path, ranks: int
) -> None:
    whole = launch(tiny_run, "run_name=whole", ranks=ranks)
    assert whole.wait() == 0, whole.printed
    draw = random.Random(ranks)
    for _ in range(4):
        run = launch(tiny_run, "run_name=killed", ranks=ranks)
        run.kill_after(draw.randrange(2, 12), tmp_path / "killed")
    last = launch(tiny_run, "run_name=killed", ranks=ranks)
    assert last.wait() == 0, last.printed
    assert losses_by_batch(tmp_path / "killed") == losses_by_batch(tmp_path / "whole")


@pytest.mark.parametrize("format", ["full", "sharded"])
def test_continued_from_the_end_of_each_epoch_two_ranks_read_what_they_read_in_one_go(
    tiny_run: Path, shards: Path, launch: Callable[..., Any], tmp_path: Path, format: str
) -> None:
    held_out = f"{{name: text, dataset: {{local: {shards}/a, split: val, shuffle: true}}}}"
    words = [
        f"eval_loader=[{{label: x, {held_out[1:]}, {{label: y, {held_out[1:]}]",
        "eval_subset_num_batches=1",
        f"fsdp_config={{state_dict_type: {format}}}",
        "train_loader.num_workers=2",
        "train_loader.dataset.epoch_size=32",
        "save_interval=1ep",
        "scheduler={name: constant_with_warmup, t_warmup: 1ba}",
    ]
    for name, durations in (("whole", (3,)), ("continued", (1, 2, 3))):
        for epochs in durations:
            run = launch(tiny_run, f"run_name={name}", *words, f"max_duration={epochs}ep", ranks=2)
            assert run.wait() == 0, run.printed
    assert losses_by_batch(tmp_path / "continued") == losses_by_batch(tmp_path / "whole")
    rows = [
        [row["eval"] for row in read_rows(tmp_path / name / "metrics.jsonl") if "eval" in row]
        for name in ("whole", "continued")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 6  # three evaluations of two labels
