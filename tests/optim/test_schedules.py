"""Schedules: by hand at chosen points, against Composer's own, and what doesn't fit."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from composer.core import Time, Timestamp
from composer.optim import (
    ComposerScheduler,
    ConstantWithWarmupScheduler,
    CosineAnnealingWithWarmupScheduler,
    LinearWithWarmupScheduler,
)

from mptfoundry.errors import ConfigError
from mptfoundry.optim.schedules import (
    BatchSize,
    Schedule,
    constant_with_warmup,
    cosine_with_warmup,
    inv_sqrt_with_warmup,
    linear_decay_with_warmup,
    warmup_stable_decay,
)


def at(schedule: Schedule, batch: int, max_duration: str = "100ba") -> float:
    return schedule.factor(Timestamp(batch=batch), Time.from_timestring(max_duration))


def test_the_warm_up_is_a_line_from_zero() -> None:
    schedule = cosine_with_warmup("10ba")
    assert [at(schedule, batch) for batch in (0, 5, 10)] == [0.0, 0.5, 1.0]


def test_cosine_at_its_quarters() -> None:
    schedule = cosine_with_warmup("20ba", alpha_f=0.1)
    assert at(schedule, 60) == pytest.approx(0.1 + 0.9 / 2)
    assert at(schedule, 40) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert at(schedule, 100) == pytest.approx(0.1)


def test_linear_decay_at_its_middle_and_end() -> None:
    schedule = linear_decay_with_warmup("20ba", alpha_i=0.8, alpha_f=0.2)
    assert at(schedule, 10) == pytest.approx(0.4)
    assert at(schedule, 60) == pytest.approx(0.5)
    assert at(schedule, 100) == pytest.approx(0.2)


def test_constant_stays() -> None:
    schedule = constant_with_warmup("10ba", alpha=0.5)
    assert [at(schedule, batch) for batch in (5, 10, 100)] == [0.25, 0.5, 0.5]
    assert at(constant_with_warmup(), 0) == 1.0


def test_inverse_square_root_then_a_line() -> None:
    schedule = inv_sqrt_with_warmup("10ba", t_scale="10ba", t_cooldown="20ba", alpha_f_decay=0.2)
    assert at(schedule, 10) == 1.0
    assert at(schedule, 40) == pytest.approx(0.2 + 0.8 / 2)
    top = 0.2 + 0.8 / math.sqrt(8)
    assert at(schedule, 80) == pytest.approx(top)
    assert at(schedule, 90) == pytest.approx(top / 2)
    assert at(schedule, 100) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("decay", "middle"),
    [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5))],
)
def test_warm_up_stable_decay(decay: str, middle: float) -> None:
    schedule = warmup_stable_decay("10ba", t_decay="20ba", decay=decay)
    assert [at(schedule, batch) for batch in (5, 10, 50, 80)] == [0.5, 1.0, 1.0, 1.0]
    assert at(schedule, 90) == pytest.approx(middle)
    assert at(schedule, 100) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            cosine_with_warmup("0.07dur", alpha_f=0.1),
            CosineAnnealingWithWarmupScheduler("0.07dur", alpha_f=0.1),
        ),
        (
            linear_decay_with_warmup("6ba", alpha_i=0.9, alpha_f=0.1),
            LinearWithWarmupScheduler("6ba", alpha_i=0.9, alpha_f=0.1),
        ),
        (constant_with_warmup("6ba", alpha=0.7), ConstantWithWarmupScheduler("6ba", alpha=0.7)),
        (cosine_with_warmup(1), CosineAnnealingWithWarmupScheduler("1ep")),
    ],
)
@pytest.mark.parametrize("max_duration", ["83ba", "7ep"])
def test_the_factors_are_composers(ours: Schedule, theirs: ComposerScheduler, max_duration: str) -> None:
    duration = Time.from_timestring(max_duration)
    for batch in range(84):
        state = SimpleNamespace(
            timestamp=Timestamp(batch=batch),
            max_duration=duration,
            dataloader_len=Time.from_timestring("12ba"),
        )
        assert ours(state) == pytest.approx(theirs(state), abs=1e-15)


def test_units_may_differ() -> None:
    """Batches of 8 samples and 64 tokens, epochs of 25 batches."""
    duration = Time.from_timestring("6400tok")
    now = Timestamp(batch=5, sample=40, token=320)
    for t_warmup in ("10ba", "80sp", "640tok", "0.1dur"):
        schedule = cosine_with_warmup(t_warmup, batch=BatchSize(samples=8, tokens=64))
        assert schedule.factor(now, duration) == 0.5
    schedule = cosine_with_warmup("2ep", batch=BatchSize(samples=8, tokens=64))
    assert schedule.factor(now, duration, batches_per_epoch=25) == 0.1


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            cosine_with_warmup("10ba", t_max="50ba"),
            "scheduler: t_warmup: 10ba, t_max: 50ba do not fit max_duration: 100ba",
        ),
        (cosine_with_warmup("10tok"), "scheduler.t_warmup: 10tok can't be compared with max_duration: 100ba"),
        (
            warmup_stable_decay("60ba", t_decay="60ba"),
            "t_decay: 60ba, t_max: 1dur do not fit",
        ),
        (
            inv_sqrt_with_warmup("1ba", t_scale="1ba", t_cooldown="101ba"),
            "t_cooldown: 101ba, t_max: 1dur do not fit max_duration: 100ba",
        ),
    ],
)
def test_times_that_do_not_fit_are_refused(schedule: Schedule, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        at(schedule, 0)


def test_a_warmup_longer_than_the_run_is_cut_short() -> None:
    for schedule in (cosine_with_warmup("200ba"), warmup_stable_decay("200ba", t_decay="10ba")):
        assert at(schedule, 50) == 0.25
