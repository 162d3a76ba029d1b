"""The line on the console."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from composer import Callback, Logger, State, Trainer

from mptfoundry.callbacks.console import ConsoleLine, batch_line, thousands
from mptfoundry.callbacks.throughput import Throughput
from mptfoundry.mpt.config import MPTConfig


def test_a_row_is_one_line() -> None:
    row = {
        "loss": 4.21345,
        "lr": 1.9e-4,
        "grad_norm": 0.8412,
        "tokens_per_second": 31234.0,
        "mfu": 0.413,
        "padding_share": 0.0214,
        "eta_seconds": 760.2,
    }
    numbers = "loss 4.213  lr 0.00019  grad norm 0.841  31.2k tok/s  MFU 41.3%  padding 2.1%  ETA 0:12:40"
    assert batch_line(row) == numbers
    assert batch_line({"loss": None, "lr": 1e-4}) == "loss not finite  lr 0.0001"


@pytest.mark.parametrize(("value", "text"), [(812.0, "812"), (31234.0, "31.2k"), (5.21e6, "5.21M")])
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert thousands(value) == text


@pytest.mark.parametrize(
    ("interval", "max_duration", "printed"),
    [
        ("3ba", "7ba", ["1/7", "3/7", "6/7", "7/7"]),
        ("64tok", "192tok", ["1", "2", "4", "6"]),
        ("1ep", "2ep", ["1/12", "6/12", "12/12"]),
    ],
)
def test_lines_come_at_the_interval_and_at_both_ends(
    make_trainer: Callable[..., Trainer],
    config: MPTConfig,
    interval: str,
    max_duration: str,
    printed: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer = make_trainer(
        max_duration=max_duration,
        with_eval=True,
        eval_interval=max_duration if max_duration.endswith("ba") else "2ep",
        loggers=[ConsoleLine(interval)],
        callbacks=[Throughput(config)],
    )
    trainer.fit()
    trainer.close()
    lines = capsys.readouterr().out.splitlines()
    batches = [line for line in lines if "loss" in line]
    assert [line.split("batch ")[1].split("]")[0].split(",")[0] for line in batches] == printed
    assert all("tok/s" in line and "ETA" in line and "MFU" not in line for line in batches)
    (evaluation,) = [line for line in lines if "eval held_out: LanguageCrossEntropy" in line]
    assert evaluation.split("]")[0] == batches[-1].split("]")[0]


class Stop(Callback):
    """Ends the training as a request to stop does."""

    def batch_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch == 3:
            state.stop_training()


def test_a_run_that_is_stopped_still_says_how_long_it_is(
    make_trainer: Callable[..., Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(max_duration="6ba", loggers=[ConsoleLine("1ba")], callbacks=[Stop()])
    trainer.fit()
    trainer.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("]")[0] for line in lines] == [f"[batch {number}/6" for number in (1, 2, 3)]
