from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mptfoundry.callbacks.foretold import Foretold, foretold_callbacks
from mptfoundry.config.load import load_train_config
from mptfoundry.forecast.constants import constants_for
from mptfoundry.plan.devices import Device, cluster_device
from mptfoundry.plan.plan import make_plan
from mptfoundry.run.report import write_report

CONFIG = Path(__file__).parents[2] / "configs/mpt-7b.yaml"


def test_a_gpu_that_the_plan_knows_is_compared_and_others_are_not() -> None:
    config, _ = load_train_config(CONFIG, ["global_train_batch_size=64"])
    [callback] = foretold_callbacks(config, make_plan(config, cluster_device("h100", 8)))
    assert isinstance(callback, Foretold) and 40_000 < callback.tokens_per_second < 120_000
    unknown = Device("gpu", "GPU", 8, 8, 80 * 2**30, has_bf16=True)
    assert foretold_callbacks(config, make_plan(config, unknown)) == []


def test_both_speeds_are_said_and_a_slow_run_is_told_to_look() -> None:
    callback = Foretold(1000.0, constants_for("NVIDIA H100 80GB HBM3"))
    text = callback.in_words(900.0)
    assert text.startswith("plan: 1,000 tokens/s foretold (an estimate, within 20%), 900 measured, 90% of it")
    assert "Slower than the plan" not in text and "Slower than the plan" in callback.in_words(700.0)


class Log:
    """What is logged."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float]) -> None:
        self.rows.append(metrics)


def test_a_run_says_it_once_after_20_steps(capsys: pytest.CaptureFixture[str]) -> None:
    callback, log = Foretold(1234.0, constants_for("NVIDIA H100 80GB HBM3")), Log()
    for batch in range(25):
        state: Any = SimpleNamespace(
            timestamp=SimpleNamespace(token=32 * (batch + 1)),
            previous_timestamp=SimpleNamespace(token=32 * batch),
        )
        callback.before_dataloader(state, log)  # type: ignore[arg-type]
        callback.batch_end(state, log)  # type: ignore[arg-type]
        assert capsys.readouterr().out.count("plan: 1,234 tokens/s foretold") == (batch == 19)
    assert log.rows == [{"throughput/foretold_tokens_per_second": 1234.0}] * 25


def test_the_report_has_what_was_foretold(tmp_path: Path) -> None:
    row = {"batch": 1, "tokens": 32, "samples": 4, "seconds": 1.0, "loss": 2.0, "lr": 0.1, "grad_norm": 1.0}
    row |= {"tokens_per_second": 32.0, "foretold_tokens_per_second": 1234.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert "| tokens per second, foretold | 1,234 |" in write_report(tmp_path).read_text()
