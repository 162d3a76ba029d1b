"""Generations during training: when, what, and that they leave the training alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer

from mptfoundry.callbacks.samples import Generate
from mptfoundry.errors import ConfigError
from mptfoundry.run.metrics_file import MetricsFile, read_rows


def most_likely(network: torch.nn.Module, prompts: Sequence[str]) -> list[str]:
    """Real logits of the network, and a draw from them that moves the random state."""
    assert not network.training
    texts = []
    for prompt in prompts:
        logits = network(torch.tensor([[len(prompt)]])).logits[0, -1]
        texts.append(str(torch.multinomial(logits.softmax(-1), 1).item()))
    return texts


def test_generations_come_at_the_interval_and_change_nothing(
    make_trainer: Callable[..., Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = []
    for prompts in ([], ["ab", "c"]):
        callbacks = [Generate(most_likely, prompts, interval="2ba")] if prompts else []
        trainer = make_trainer(max_duration="5ba", callbacks=callbacks, loggers=[MetricsFile(tmp_path)])
        trainer.fit()
        trainer.close()
        weights.append({name: value.clone() for name, value in trainer.state.model.state_dict().items()})
    tables = [row for row in read_rows(tmp_path / "metrics.jsonl") if "generations" in row]
    assert [row["batch"] for row in tables] == [2, 4, 5]
    assert [entry["prompt"] for entry in tables[0]["generations"]] == ["ab", "c"]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert "[batch 2]  'ab' -> '" in capsys.readouterr().out


def trained_with(make_trainer: Callable[..., Trainer], logger: Any, name: str) -> None:
    """A training of four batches that writes twice, and shows the texts that it wrote."""
    callback = Generate(most_likely, ["a|b", "c\nd"], interval="2ba")
    trainer = make_trainer(max_duration="4ba", run_name=name, callbacks=[callback], loggers=[logger])
    trainer.fit()
    trainer.close()


def test_tensorboard_has_the_generations_as_text(
    make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    pytest.importorskip(
        "tensorboard", reason="tensorboard is not installed: pip install 'mptfoundry[tensorboard]'"
    )
    from composer.loggers import TensorboardLogger
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    trained_with(make_trainer, TensorboardLogger(log_dir=str(tmp_path)), "run")
    events = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    found = events.Tensors("run", "generations/text_summary")
    assert [event.step for event in found] == [2, 4]
    lines = found[0].tensor_proto.string_val[0].decode().splitlines()
    assert lines[:2] == ["| batch | prompt | generation |", "| --- | --- | --- |"]
    assert lines[2].startswith("| 2 | a\\|b | ") and lines[3].startswith("| 2 | c\\nd | ")


def test_wandb_has_the_generations_as_tables(
    make_trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'mptfoundry[wandb]'")
    from composer.loggers import WandBLogger

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trained_with(make_trainer, WandBLogger(project="test", log_artifacts=False), "run")
    tables = [json.loads(file.read_text()) for file in sorted(tmp_path.rglob("generations*.table.json"))]
    assert all(table["columns"] == ["batch", "prompt", "generation"] for table in tables)
    assert sorted(row[:2] for table in tables for row in table["data"]) == [
        [batch, prompt] for batch in (2, 4) for prompt in ("a|b", "c\nd")
    ]


@pytest.mark.soak
def test_mlflow_has_the_generations_as_a_table(
    make_trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install 'mptfoundry[mlflow]'")
    from composer.loggers import MLFlowLogger

    monkeypatch.chdir(tmp_path)
    logger = MLFlowLogger(
        experiment_name="test", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", log_system_metrics=False
    )
    trained_with(make_trainer, logger, "run")
    (file,) = tmp_path.rglob("generations.json")
    table = json.loads(file.read_text())
    assert table["columns"] == ["batch", "prompt", "generation"]
    assert [row[:2] for row in table["data"]] == [
        [batch, prompt] for batch in (2, 4) for prompt in ("a|b", "c\nd")
    ]


@pytest.mark.parametrize("prompts", [[], "one text"])
def test_prompts_are_a_list(prompts: Sequence[str]) -> None:
    with pytest.raises(ConfigError, match=r"callbacks\.generate_callback\.prompts"):
        Generate(most_likely, prompts)
