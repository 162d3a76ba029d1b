"""What a training step on a GPU waits for, under Composer's Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

COMPOSER = "composer/trainer/trainer.py"
# How often a step of two microbatches waits for the device. Only the second is ours: the loss of all
# microbatches, the gradient's norm and a request to stop are read at once.
WAITS = {
    f"read a number: {COMPOSER} _train_microbatches": 1,
    "read a number: mptfoundry/run/step_guard.py after_train_batch": 1,
    f"read a number: {COMPOSER} <lambda>": 1,
    f"copy from the device: {COMPOSER} <dictcomp>": 1,
    f"read a number: {COMPOSER} <dictcomp>": 1,
    f"read a number: {COMPOSER} _iter_dataloader": 1,
    f"copy from the device: {COMPOSER} _accumulate_time_across_ranks": 3,
    f"read a number: {COMPOSER} _accumulate_time_across_ranks": 3,
}


def test_a_step_of_packed_rows_waits_where_composer_does_and_once_more(
    start: Callable[..., Any], tiny_run: Path
) -> None:
    words = ["max_duration=3ba", "device_train_microbatch_size=4", "model.d_model=64", "save_folder=null"]
    words += ["train_loader.dataset.eos_token_id=0"]
    words += (
        ["optimizer.fused=true", "optimizer.bf16_weights=true"] if hasattr(torch.Tensor, "grad_dtype") else []
    )
    steps = start("trainer.py", str(tiny_run), *words)
    assert len(steps) == 3
    for waits in steps[1:]:
        # From Python 3.12 on, a comprehension is a part of the function around it.
        assert {what.replace("_train_loop", "<dictcomp>"): n for what, n in waits.items()} == WAITS
