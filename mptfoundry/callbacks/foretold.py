"""The speed that the plan foretells, with the measured one: a line after 20 steps, a row of the report."""

from __future__ import annotations

import statistics
import time
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger

from mptfoundry.config.run import TrainConfig
from mptfoundry.forecast.constants import Constants, constants_for
from mptfoundry.forecast.hardware import hardware_of
from mptfoundry.forecast.settings import own_setting
from mptfoundry.plan.plan import Plan
from mptfoundry.ranks import say

# The first steps warm up: kernels are compiled, memory is reserved.
WARMUP, STEPS = 5, 20


def foretold_callbacks(config: TrainConfig, plan: Plan) -> list[Callback]:
    """The callback that compares, or none where the plan knows nothing about the device."""
    hardware, constants = hardware_of(plan.device), constants_for(plan.device.name)
    time_of_step = own_setting(config, plan, hardware, constants.rates).time
    if time_of_step is None:
        return []
    return [Foretold(plan.tokens_per_batch / time_of_step.total, constants)]


class Foretold(Callback):
    """Logs `throughput/foretold_tokens_per_second` at each batch, and prints both speeds after 20 steps.

    Args:
        tokens_per_second: What the plan foretells for all devices.
        constants: What it is computed with.
    """

    def __init__(self, tokens_per_second: float, constants: Constants) -> None:
        self.tokens_per_second = tokens_per_second
        self.constants = constants
        self._seconds: list[float] = []
        self._tokens = 0
        self._fetched_at: float | None = None

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """Start timing the batch."""
        self._fetched_at = time.perf_counter()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log the foretold speed, and after 20 steps print it with the measured one."""
        logger.log_metrics({"throughput/foretold_tokens_per_second": self.tokens_per_second})
        if self._fetched_at is None or len(self._seconds) >= STEPS:
            return
        self._seconds.append(time.perf_counter() - self._fetched_at)
        before: Any = state.previous_timestamp
        self._tokens = int(state.timestamp.token - before.token)
        if len(self._seconds) == STEPS:
            say(self.in_words(self._tokens / statistics.median(self._seconds[WARMUP:])))

    def in_words(self, measured: float) -> str:
        """Both speeds, and where the foretold one comes from."""
        expected, band = self.tokens_per_second, self.constants.band
        kind = "measured here" if self.constants.is_fitted else "an estimate"
        text = (
            f"plan: {expected:,.0f} tokens/s foretold ({kind}, within {band:.0%}), {measured:,.0f} measured, "
            f"{measured / expected:.0%} of it; constants: {self.constants.source}"
        )
        if measured < (1 - band) * expected:
            text += ". Slower than the plan: look at the data loaders, the network and other jobs"
        return text
