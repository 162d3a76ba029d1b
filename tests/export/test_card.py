from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from mptfoundry.checkpoints.checksums import identity_of
from mptfoundry.checkpoints.reading import open_model
from mptfoundry.export.card import model_card
from mptfoundry.mpt.config import AttnConfig

WriteRun = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An exported folder, as far as a card looks at it."""
    path = tmp_path / "exported"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "mpt"}')
    return path


def test_the_card_tells_the_runs_numbers_up_to_the_checkpoint(write_run: WriteRun, folder: Path) -> None:
    run = write_run(batch=2)
    lines = [
        {"batch": 1, "tokens": 64, "loss": 6.0},
        {"batch": 1, "eval": {"held_out": {"LanguagePerplexity": 300.0, "tokens": 1234.0}}},
        {"batch": 2, "tokens": 128, "loss": 5.5},
        {"batch": 3, "tokens": 192, "loss": 5.0},
    ]
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"batch": 3, "lo'
    )
    card = model_card("mine", open_model(run), folder, torch.bfloat16, "apache-2.0")
    for line in (
        "# mine",
        "| batches | 2 |",
        "| tokens | 128 |",
        "| training loss, mean of the last 5 % | 5.5000 |",
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


def test_the_runs_picture_lies_in_the_folder_and_is_shown(write_run: WriteRun, folder: Path) -> None:
    run = write_run()
    (run / "metrics.jsonl").write_text(json.dumps({"batch": 1, "tokens": 64, "loss": 6.0}) + "\n")
    without = model_card("mine", open_model(run), folder, torch.float32, None)
    assert "![" not in without and not (folder / "report.png").exists()
    (run / "report.png").write_bytes(b"a picture")
    card = model_card("mine", open_model(run), folder, torch.float32, None)
    assert "](report.png)" in card
    assert (folder / "report.png").read_bytes() == b"a picture"


def test_a_card_without_run_or_licence_says_only_what_is_known(write_run: WriteRun, folder: Path) -> None:
    card = model_card("mine", open_model(write_run()), folder, torch.float32, None)
    assert "## Training" not in card
    assert "None was stated" in card
    assert "license" not in yaml.safe_load(card.split("---")[1])


def test_a_card_tells_how_the_folder_is_loaded(write_run: WriteRun, folder: Path) -> None:
    source = open_model(write_run())
    native = model_card("mine", source, folder, torch.float32, None)
    assert "trust_remote_code" not in native and "ALiBi" in native and "max_seq_len=..." in native
    (folder / "config.json").write_text('{"model_type": "mptfoundry"}')
    learned = replace(source, config=replace(source.config, attn_config=AttnConfig()))
    custom = model_card("mine", learned, folder, torch.float32, None)
    assert 'from_pretrained("mine", trust_remote_code=True)' in custom
    assert "learned positions" in custom and "max_seq_len=..." not in custom


def write_results(home: Path, name: str, model: str, accuracy: float, limit: int = -1) -> None:
    folder = home / "evals" / name
    folder.mkdir(parents=True)
    results = {
        "copa/3-shot": {"InContextLearningMultipleChoiceAccuracy": accuracy, "stderr": 0.02, "seconds": 3.0}
    }
    content = {"results": results, "settings": {"model": model, "limit": limit}}
    (folder / "eval.json").write_text(json.dumps(content))


def test_the_card_has_the_results_of_the_same_weights(write_run: WriteRun, folder: Path) -> None:
    run = write_run(batch=2)
    source = open_model(run)
    identity = identity_of(source.path)
    write_results(run, "other", "another model", 0.9)
    write_results(run, "whole", identity, 0.625)
    write_results(run, "some", identity, 0.75, limit=4)
    (run / "evals/torn").mkdir()
    (run / "evals/torn/eval.json").write_text('{"results": ')
    card = model_card("mine", source, folder, torch.float32, None)
    assert "| copa/3-shot: InContextLearningMultipleChoiceAccuracy | 0.6250 ± 0.0200 |" in card
    [result] = ModelCard(card).data.eval_results
    assert (result.dataset_type, result.dataset_config, result.metric_type) == ("copa", "3-shot", "accuracy")
    assert result.metric_value == 0.625
    shutil.rmtree(run / "evals/whole")
    card = model_card("mine", source, folder, torch.float32, None)
    assert "| 0.7500 ± 0.0200 (the first 4 documents) |" in card


def test_without_other_results_the_card_has_the_tasks_of_the_checkpoints_batch(
    write_run: WriteRun, folder: Path
) -> None:
    run = write_run(batch=2)
    lines = []
    for batch in (1, 2, 3):
        results = {"copa/0-shot": {"InContextLearningMultipleChoiceAccuracy": batch / 10, "stderr": None}}
        lines.append({"batch": batch, "tokens": 64 * batch, "loss": 6.0})
        lines.append(
            {"batch": batch, "tokens": 64 * batch, "eval": {**results, "eval_gauntlet": {"core": batch}}}
        )
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    card = model_card("mine", open_model(run), folder, torch.float32, None)
    assert "| copa/0-shot: InContextLearningMultipleChoiceAccuracy | 0.2000 |" in card
    assert "| eval_gauntlet: core | 2.0000 |" in card
    assert card.count("copa/0-shot: ") == 1
