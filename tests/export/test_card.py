from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from mptfoundry.checkpoints.reading import open_model
from mptfoundry.export.card import model_card

WriteRun = Callable[..., Path]


def test_the_card_tells_the_runs_numbers_up_to_the_checkpoint(write_run: WriteRun) -> None:
    run = write_run(batch=2)
    lines = [
        {"batch": 1, "tokens": 64, "loss": 6.0},
        {"batch": 1, "eval": {"held_out": {"LanguagePerplexity": 300.0, "tokens": 1234}}},
        {"batch": 2, "tokens": 128, "loss": 5.5},
        {"batch": 3, "tokens": 192, "loss": 5.0},
    ]
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"batch": 3, "lo'
    )
    card = model_card("mine", open_model(run), torch.bfloat16, "apache-2.0")
    for line in (
        "# mine",
        "| batches | 2 |",
        "| tokens | 128 |",
        "| training loss of the last batch | 5.5000 |",
        "| held_out: LanguagePerplexity | 300.0000 |",
        "| held_out: tokens | 1,234 |",
        "| code | proportion 0.7 |",
        "| prose | by its size |",
        "apache-2.0.",
    ):
        assert f"\n{line}\n" in card
    assert "/x" not in card
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "apache-2.0"


def test_a_card_without_run_or_licence_says_only_what_is_known(write_run: WriteRun) -> None:
    card = model_card("mine", open_model(write_run()), torch.float32, None)
    assert "## Training" not in card
    assert "None was stated" in card
    assert "license" not in yaml.safe_load(card.split("---")[1])
