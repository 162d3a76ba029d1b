from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from composer import Trainer

from mptfoundry.callbacks.foretold import Foretold, foretold_callbacks
from mptfoundry.config.load import load_train_config
from mptfoundry.forecast.constants import constants_for
from mptfoundry.plan.devices import Device, cluster_device
from mptfoundry.plan.plan import make_plan
from mptfoundry.run.metrics_file import MetricsFile, read_rows
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


def test_a_run_prints_it_once_and_its_report_has_it(
    make_trainer: Callable[..., Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = Foretold(1234.0, constants_for("NVIDIA H100 80GB HBM3"))
    trainer = make_trainer(max_duration="22ba", loggers=[MetricsFile(tmp_path)], callbacks=[callback])
    trainer.fit()
    trainer.close()
    printed = capsys.readouterr().out
    assert printed.count("plan: 1,234 tokens/s foretold") == 1
    assert all(row["foretold_tokens_per_second"] == 1234.0 for row in read_rows(tmp_path / "metrics.jsonl"))
    assert "| tokens per second, foretold | 1,234 |" in write_report(tmp_path).read_text()
