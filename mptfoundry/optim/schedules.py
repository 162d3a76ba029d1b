"""Learning rate schedules: a factor `alpha(t)` on the optimizer's `lr`.

Each schedule is an equation in `t`, the time since the start, with all times in one unit. Times have
Composer's format: `100ba` (batches), `1000000tok` (tokens), `4096sp` (samples), `1ep` (epochs), `0.01dur`
(a fraction of `max_duration`); a bare integer counts epochs. A schedule may mix units: batches are converted
to samples or tokens by the batch size.

Every schedule warms up linearly from 0, `alpha(t) = t / t_warmup` for `t < t_warmup`; the equations below
apply after that. The factors equal those of Composer's and llm-foundry's schedulers of the same names.
Composer steps the schedule before its clock, so a step uses the factor of the time at which the previous step
began, and a run with warmup has a learning rate of 0 in its first two steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from composer.core import State, Time, Timestamp, TimeUnit

from mptfoundry.errors import ConfigError

DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda tau: tau,
    "cosine": lambda tau: (1 - math.cos(math.pi * tau)) / 2,
    "sqrt": math.sqrt,
}


@dataclass(frozen=True)
class BatchSize:
    """The size of a global batch, over all devices.

    Attributes:
        samples: Rows of a batch.
        tokens: Tokens of a batch, including padding; None if batches differ.
    """

    samples: int
    tokens: int | None = None


@dataclass(frozen=True)
class Schedule:
    """A Composer scheduler: called with the trainer's state, it returns the factor on the learning rate.

    Attributes:
        times: The schedule's times by name, as written; always includes `t_max` and `t_warmup`.
        alpha: The equation after the warmup, called with `t` and all `times`, in one unit.
        batch: Needed only if the units of `times` and `max_duration` differ.
        height: The factor at the end of the warmup.
    """

    times: Mapping[str, str | int]
    alpha: Callable[..., float]
    batch: BatchSize | None = None
    height: float = 1.0

    def __call__(self, state: State) -> float:
        """The current factor, see `factor`."""
        assert state.max_duration is not None
        length = None if state.dataloader_len is None else int(state.dataloader_len)
        return self.factor(state.timestamp, state.max_duration, length)

    def factor(self, now: Timestamp, max_duration: Time, batches_per_epoch: int | None = None) -> float:
        """The factor at `now` in a run of `max_duration`; `batches_per_epoch` is for times in epochs.

        Raises:
            ConfigError: The times don't fit each other or `max_duration`, or can't be compared with it.
        """
        unit = _clock_unit(max_duration)
        clock = _Clock(unit, max_duration, batches_per_epoch, self.batch)
        spans = {name: clock.span(f"scheduler.{name}", time) for name, time in self.times.items()}
        self._check(spans, clock.span("max_duration", str(max_duration)), max_duration)
        t = float(now.get(unit).value)
        if t < spans["t_warmup"]:
            return self.height * t / spans["t_warmup"]
        return self.alpha(t, **spans)

    def _check(self, spans: dict[str, float], duration: float, max_duration: Time) -> None:
        """Compare the times; config has done so, except for times in epochs."""
        end, warmup, decay = spans["t_max"], spans["t_warmup"], spans.get("t_decay", 0)
        # A run may end during warmup: that helps to try the first batches of a recipe.
        fits = max(decay, spans.get("t_cooldown", 0)) <= end and (warmup > end or warmup + decay <= end)
        if end < duration or not fits:
            raise self._misfit(max_duration)

    def _misfit(self, max_duration: Time) -> ConfigError:
        times = ", ".join(f"{name}: {time}" for name, time in self.times.items())
        return ConfigError(
            f"scheduler: {times} do not fit max_duration: {max_duration}. t_max can't be shorter than "
            "the run, and a decay or cooldown must fit into t_max after the warmup."
        )


def constant_with_warmup(
    t_warmup: str | int = "0ba",
    *,
    alpha: float = 1.0,
    t_max: str | int = "1dur",
    batch: BatchSize | None = None,
) -> Schedule:
    """`alpha(t) = alpha`; the warmup ends at `alpha`."""
    return Schedule({"t_warmup": t_warmup, "t_max": t_max}, lambda t, **_: alpha, batch, height=alpha)


def cosine_with_warmup(
    t_warmup: str | int, *, t_max: str | int = "1dur", alpha_f: float = 0.0, batch: BatchSize | None = None
) -> Schedule:
    """`alpha(t) = alpha_f + (1 - alpha_f) * (1 + cos(pi * tau)) / 2`, with
    `tau = (t - t_warmup) / (t_max - t_warmup)`, at most 1 (https://arxiv.org/abs/1608.03983).
    """

    def alpha(t: float, *, t_warmup: float, t_max: float) -> float:
        tau = _share(t - t_warmup, t_max - t_warmup)
        return alpha_f + (1 - alpha_f) * (1 + math.cos(math.pi * tau)) / 2

    return Schedule({"t_warmup": t_warmup, "t_max": t_max}, alpha, batch)


def linear_decay_with_warmup(
    t_warmup: str | int,
    *,
    t_max: str | int = "1dur",
    alpha_i: float = 1.0,
    alpha_f: float = 0.0,
    batch: BatchSize | None = None,
) -> Schedule:
    """`alpha(t) = alpha_i + (alpha_f - alpha_i) * tau`, with `tau = (t - t_warmup) / (t_max - t_warmup)`, at
    most 1. The warmup ends at `alpha_i`.
    """

    def alpha(t: float, *, t_warmup: float, t_max: float) -> float:
        return alpha_i + (alpha_f - alpha_i) * _share(t - t_warmup, t_max - t_warmup)

    return Schedule({"t_warmup": t_warmup, "t_max": t_max}, alpha, batch, height=alpha_i)


def inv_sqrt_with_warmup(
    t_warmup: str | int,
    *,
    t_scale: str | int,
    t_cooldown: str | int,
    t_max: str | int = "1dur",
    alpha_f_decay: float = 0.0,
    alpha_f_cooldown: float = 0.0,
    batch: BatchSize | None = None,
) -> Schedule:
    """Inverse square root, then a linear cooldown, as in llm-foundry: for runs that are extended later.

    With `t_c = max(t_warmup, t_max - t_cooldown)`, the start of the cooldown:

        alpha(t) = alpha_f_decay + (1 - alpha_f_decay) / sqrt((t - t_warmup + t_scale) / t_scale)  if t < t_c
        alpha(t) = alpha(t_c) + (alpha_f_cooldown - alpha(t_c)) * min(1, (t - t_c) / t_cooldown)   after
    """

    def alpha(t: float, *, t_warmup: float, t_scale: float, t_cooldown: float, t_max: float) -> float:
        t_begin = max(t_warmup, t_max - t_cooldown)
        decayed = alpha_f_decay + (1 - alpha_f_decay) / math.sqrt(
            (min(t, t_begin) - t_warmup + t_scale) / t_scale
        )
        if t < t_begin or t_cooldown == 0:
            return decayed
        return decayed + (alpha_f_cooldown - decayed) * _share(t - t_begin, t_cooldown)

    times = {"t_warmup": t_warmup, "t_scale": t_scale, "t_cooldown": t_cooldown, "t_max": t_max}
    return Schedule(times, alpha, batch)


def warmup_stable_decay(
    t_warmup: str | int,
    *,
    t_decay: str | int = "0.1dur",
    t_max: str | int = "1dur",
    alpha_f: float = 0.0,
    decay: Literal["linear", "cosine", "sqrt"] = "linear",
    batch: BatchSize | None = None,
) -> Schedule:
    """1 until `t_max - t_decay`, then decay to `alpha_f` (https://arxiv.org/abs/2404.06395):

        alpha(t) = 1 - (1 - alpha_f) * f(tau),  tau = (t - (t_max - t_decay)) / t_decay, from 0 to 1

    with `f(tau) = tau` (`linear`), `(1 - cos(pi * tau)) / 2` (`cosine`) or `sqrt(tau)` (`sqrt`,
    https://arxiv.org/abs/2405.18392).
    """
    shape = DECAYS[decay]

    def alpha(t: float, *, t_warmup: float, t_decay: float, t_max: float) -> float:
        tau = max(0.0, _share(t - (t_max - t_decay), t_decay))
        return 1 - (1 - alpha_f) * shape(tau)

    return Schedule({"t_warmup": t_warmup, "t_decay": t_decay, "t_max": t_max}, alpha, batch)


@dataclass(frozen=True)
class _Clock:
    """Converts times of any unit into one unit: batches, samples or tokens."""

    unit: TimeUnit
    max_duration: Time
    batches_per_epoch: int | None
    batch: BatchSize | None

    def span(self, name: str, written: str | int) -> float:
        """A time in the clock's unit, rounded down to a whole number as Composer does."""
        time = Time.from_input(written, TimeUnit.EPOCH)
        if time.unit == TimeUnit.DURATION:
            whole = self._convert(name, str(self.max_duration), self.max_duration)
            return float(int(float(time.value) * whole))
        return float(int(self._convert(name, written, time)))

    def _convert(self, name: str, written: str | int, time: Time) -> float:
        if time.unit == self.unit:
            return float(time.value)
        return float(time.value) * self._size(name, written, time.unit) / self._size(name, written, self.unit)

    def _size(self, name: str, written: str | int, unit: TimeUnit) -> float:
        """How many batches one `unit` is, to compare times in different units."""
        if unit == TimeUnit.BATCH:
            return 1.0
        if unit == TimeUnit.EPOCH and self.batches_per_epoch is not None:
            return float(self.batches_per_epoch)
        if unit == TimeUnit.SAMPLE and self.batch is not None:
            return 1 / self.batch.samples
        if unit == TimeUnit.TOKEN and self.batch is not None and self.batch.tokens is not None:
            return 1 / self.batch.tokens
        raise ConfigError(
            f"{name}: {written} can't be compared with max_duration: {self.max_duration}, since the length "
            "of an epoch or the tokens of a batch aren't known beforehand. Use max_duration's unit, or dur."
        )


def _clock_unit(max_duration: Time) -> TimeUnit:
    return TimeUnit.BATCH if max_duration.unit == TimeUnit.EPOCH else max_duration.unit


def _share(part: float, whole: float) -> float:
    return min(1.0, part / whole) if whole > 0 else 0.0
