"""A run that is killed at any moment and started again with the same command is the run that never was."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import losses_by_batch


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
