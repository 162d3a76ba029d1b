from __future__ import annotations

import pytest

from mptfoundry.callbacks.loss_spikes import LossSpikes
from mptfoundry.errors import ConfigError


def filled(**options: object) -> LossSpikes:
    spikes = LossSpikes(window_size=4, **options)  # type: ignore[arg-type]
    assert [spikes.judge(2.0) for _ in range(4)] == [None] * 4
    return spikes


def test_nothing_is_said_before_the_window_is_full() -> None:
    spikes = LossSpikes(window_size=4)
    assert [spikes.judge(loss) for loss in (1.0, 50.0, 1.0, 50.0)] == [None] * 4


def test_an_outlier_is_said_and_training_goes_on() -> None:
    verdict = filled().judge(4.0)
    assert verdict is not None and not verdict.stops and not verdict.skips
    assert "4 is at least 2 times the mean of the last 4 batches, 2; 1 in a row" in verdict.text
    assert filled().judge(3.9) is None


def test_more_outliers_in_a_row_than_patience_end_the_run() -> None:
    spikes = filled(log_only=False, patience=1, skip_batch=True)
    first, second = spikes.judge(9.0), spikes.judge(9.0)
    assert first is not None and first.skips and not first.stops
    assert second is not None and second.stops
    assert filled(log_only=False, patience=0).judge(9.0).stops  # type: ignore[union-attr]


def test_a_batch_that_is_left_out_does_not_move_the_window() -> None:
    left_out, taken = filled(skip_batch=True), filled()
    for spikes in (left_out, taken):
        spikes.judge(100.0)
    assert left_out.judge(4.0) is not None
    assert taken.judge(4.0) is None


def test_a_loss_that_stays_high_is_said_once_or_ends_the_run() -> None:
    logs, stops = (
        LossSpikes(window_size=4, loss_cap=1.5, log_only=True),
        LossSpikes(window_size=4, loss_cap=1.5, log_only=False),
    )
    verdicts = [logs.judge(2.0) for _ in range(12)]
    assert [number for number, verdict in enumerate(verdicts, start=1) if verdict] == [9]
    assert [stops.judge(2.0) for _ in range(8)] == [None] * 8
    last = stops.judge(2.0)
    assert last is not None and last.stops


def test_a_resumed_run_judges_as_one_that_was_never_stopped() -> None:
    whole, resumed = filled(), LossSpikes(window_size=4)
    resumed.load_state_dict(whole.state_dict())
    for loss in (2.5, 9.0, 9.0, 2.0, 30.0):
        assert whole.judge(loss) == resumed.judge(loss)
    assert whole.state_dict() == resumed.state_dict()


@pytest.mark.parametrize("wrong", [{"window_size": 1}, {"patience": -1}, {"outlier_multiplier": 1.0}])
def test_what_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        LossSpikes(**wrong)  # type: ignore[arg-type]
