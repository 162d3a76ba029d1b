"""Generations during training: when, what, and that they leave the training alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from composer import Trainer

from mptfoundry.callbacks.metrics_file import MetricsFile, read_rows
from mptfoundry.callbacks.samples import Generate
from mptfoundry.errors import ConfigError


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


@pytest.mark.parametrize("prompts", [[], "one text"])
def test_prompts_are_a_list(prompts: Sequence[str]) -> None:
    with pytest.raises(ConfigError, match=r"callbacks\.generate_callback\.prompts"):
        Generate(most_likely, prompts)
