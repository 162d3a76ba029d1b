"""Throughput, MFU, peak memory and remaining time of a run.

Only training is timed: from the request for a batch to the end of its step, including the wait for data, but
not evaluations, checkpoints and loggers. MFU is model FLOPs utilization: the FLOPs that the model needs for
the tokens, divided by the device's dense bf16 FLOPs in that time; recomputation doesn't count. `mfu` counts
attention in full, the convention of published MFU; `mfu_causal` counts only what a causal model needs (see
mpt/flops.py).
"""

from __future__ import annotations

import resource
import time
from collections import deque

import torch
from composer.core import Callback, State, Time, TimeUnit
from composer.loggers import Logger

from mptfoundry.mpt.config import MPTConfig
from mptfoundry.mpt.flops import flops_per_token
from mptfoundry.ranks import world_size

# Rates are averages over this many batches. The second batch drops the first, which includes warmup.
WINDOW = 10


class Throughput(Callback):
    """Logs, after each batch, under `throughput/`:

    tokens_per_second (all devices), tokens_per_second_per_device, mfu and mfu_causal (if the device's peak is
    known), peak_memory_bytes (of this process; on its GPU if it has one) and eta_seconds. If rows are padded
    or packed, also padding_share, the padded fraction of the batch's positions, and packing_efficiency, the
    batch's tokens divided by rows * `max_seq_len`.

    Args:
        config: The network.
        peak_flops: Dense bf16 FLOP/s of one device; None if it isn't known, as on a CPU.
        extra_flops_per_token: Added to those of training the whole network; negative if weights are frozen.
    """

    def __init__(
        self, config: MPTConfig, *, peak_flops: float | None = None, extra_flops_per_token: int = 0
    ) -> None:
        self.config = config
        self.extra_flops_per_token = extra_flops_per_token
        self.peak_flops = peak_flops
        self._window: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        self._batches = 0
        self._fetched_at = self._started_at = self._trained_seconds = 0.0
        self._end: Time | None = None

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """Start timing the batch, and once more after the first one, which includes warmup."""
        self._end = state.max_duration  # type: ignore[assignment]  # a request to stop changes it
        self._fetched_at = time.perf_counter()
        if self._batches <= 1:
            self._started_at, self._trained_seconds = self._fetched_at, 0.0
            self._window.clear()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Stop timing the batch: Composer has synced on the loss, so the device is done."""
        seconds = time.perf_counter() - self._fetched_at
        self._batches += 1
        self._trained_seconds += seconds
        now, before = state.timestamp, state.previous_timestamp
        assert before is not None
        tokens, rows = int(now.token - before.token), int(now.sample - before.sample)
        self._window.append((seconds, tokens))
        per_second = sum(tokens for _, tokens in self._window) / sum(spent for spent, _ in self._window)
        per_device = per_second / world_size()
        seq_len = state.batch["input_ids"].shape[1]
        known = {
            "tokens_per_second": per_second,
            "tokens_per_second_per_device": per_device,
            "peak_memory_bytes": peak_memory_bytes(),
            "eta_seconds": self._eta_seconds(state),
        }
        if self.peak_flops is not None:
            known |= self._shares_of_peak(per_device, seq_len, self.peak_flops)
        if "max_documents" in state.batch:
            known["padding_share"] = 1 - tokens / (rows * seq_len)
            known["packing_efficiency"] = tokens / (rows * self.config.max_seq_len)
        logger.log_metrics({f"throughput/{key}": value for key, value in known.items() if value is not None})

    def _shares_of_peak(self, tokens_per_second: float, seq_len: int, peak: float) -> dict[str, float]:
        shares = {}
        for name, causal in (("mfu", False), ("mfu_causal", True)):
            flops = flops_per_token(self.config, seq_len, causal=causal) + self.extra_flops_per_token
            shares[name] = tokens_per_second * flops / peak
        return shares

    def _eta_seconds(self, state: State) -> float | None:
        """Remaining time at the window's pace, assuming evaluations and checkpoints as often as so far."""
        total = total_batches(state, self._end)
        if total is None:
            return None
        pace = sum(spent for spent, _ in self._window) / len(self._window)
        elapsed = time.perf_counter() - self._started_at
        remaining = max(0.0, total - state.timestamp.batch.value)
        return remaining * pace * max(1.0, elapsed / self._trained_seconds)


def total_batches(state: State, end: Time | None) -> float | None:
    """Batches of the whole run, estimated from the average batch so far; None if unknown."""
    if end is not None and end.unit == TimeUnit.EPOCH and state.dataloader_len is not None:
        return end.value * int(state.dataloader_len)
    if end is not None and end.unit in (TimeUnit.BATCH, TimeUnit.SAMPLE, TimeUnit.TOKEN):
        return end.value * state.timestamp.batch.value / state.timestamp.get(end.unit).value
    return None


def peak_memory_bytes() -> int:
    """Peak memory of this process: on its GPU if it has one, otherwise its resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
