"""The time and the cost of a whole run: steps, evaluations, checkpoints, and what interruptions lose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mptfoundry.config.data import LoaderConfig
from mptfoundry.config.engine.durations import parse_duration
from mptfoundry.config.rules import tokens_of
from mptfoundry.config.run import TrainConfig
from mptfoundry.forecast.hardware import Hardware
from mptfoundry.forecast.settings import Setting
from mptfoundry.forecast.step_time import Rates, forward_seconds
from mptfoundry.plan.memory import FP32, state_bytes
from mptfoundry.plan.plan import Plan
from mptfoundry.plan.table import Streams

DAY = 86400.0
# GPU-days between interruptions. MPT-7B's run had 4 in 440 GPUs x 9.5 days
# (https://www.mosaicml.com/blog/mpt-7b), Llama 3's 419 in 16,384 GPUs x 54 days (arXiv:2407.21783, 3.3).
GPU_DAYS_PER_FAILURE = 1000.0
RESTART_SECONDS = 600.0
# To copy a device's part of a checkpoint to the host, and to write it, in bytes per second; assumed.
HOST_COPY, STORE_OF_A_MACHINE = 10e9, 2e9
# Share of a packed row that examples fill; assumed.
PACKED = 0.95


@dataclass(frozen=True)
class Length:
    """How long a run is: its batches, if they are known, and what was assumed about them."""

    batches: int | None
    assumed: str = ""


@dataclass(frozen=True)
class Checkpoints:
    """What a run saves.

    Attributes:
        bytes: Of one checkpoint.
        saved: How many it saves; None if its length is unknown.
        kept: How many of them stay.
        bytes_kept: Of all that stay.
    """

    bytes: int
    saved: int | None
    kept: int
    bytes_kept: int


@dataclass(frozen=True)
class RunCost:
    """The time of a run in seconds.

    Attributes:
        training: All steps.
        evaluation: All evaluations.
        checkpointing: While training waits for a checkpoint.
        goodput: The share of the time that is not lost to interruptions.
        devices: The run's devices.
        dollars: Its cost; None without a price.
    """

    training: float
    evaluation: float
    checkpointing: float
    goodput: float
    devices: int
    dollars: float | None

    @property
    def seconds(self) -> float:
        """From the start to the end."""
        return (self.training + self.evaluation + self.checkpointing) / self.goodput

    @property
    def device_hours(self) -> float:
        """Hours of all devices together."""
        return self.seconds / 3600 * self.devices


def run_length(
    config: TrainConfig, streams: Streams, examples: int | None, tokens_per_example: float | None
) -> Length:
    """The batches of a run, from its duration and from what is known about its data."""
    if (batches := config.batches()) is not None:
        return Length(batches)
    number, unit = parse_duration(config.max_duration)
    if unit != "ep":
        return Length(None, f"max_duration: {config.max_duration} says nothing about the number of steps")
    sizes = [streams.get(("train", name)) for name in config.train_loader.dataset.sources]
    known = [each.samples for each in sizes if each is not None and each.samples is not None]
    samples, assumed = examples, "examples as given"
    if samples is None:
        if len(known) < len(sizes):
            return Length(None, "the size of the data is not known here; say it with examples=N")
        samples, assumed = sum(known), ""
    rows, how = _rows(config, samples, tokens_per_example)
    if rows is None:
        return Length(None, how)
    text = "; ".join(filter(None, [assumed, how]))
    return Length(int(number) * max(1, int(rows // config.global_train_batch_size)), text)


def _rows(config: TrainConfig, samples: int, tokens_per_example: float | None) -> tuple[float | None, str]:
    """Rows of an epoch: packing puts several examples into one."""
    ratio = getattr(config.train_loader.dataset, "packing_ratio", None)
    if ratio is None:
        is_text = config.train_loader.name == "text"
        return samples, "" if is_text else "each example fills a row, with padding; none is dropped"
    if ratio != "auto":
        return samples / ratio, f"{ratio:g} examples in a row; none is dropped"
    if tokens_per_example is None:
        return None, "how many examples fill a row is not known; say it with tokens_per_example=N"
    each = min(tokens_per_example, config.max_seq_len)
    return samples * each / (config.max_seq_len * PACKED), f"rows packed to {PACKED:.0%}; none is dropped"


def checkpoints_of(config: TrainConfig, plan: Plan, length: Length) -> Checkpoints:
    """The size of a run's checkpoints, and how many it saves and keeps."""
    trainable = plan.trainable
    state = 0 if config.save_weights_only else state_bytes(config.optimizer, trainable.parameters)
    weights = trainable.parameters if trainable.adapters else trainable.parameters + trainable.frozen
    size = FP32 * weights + state
    if config.save_folder is None:
        return Checkpoints(size, 0, 0, 0)
    saved = times_in_run(config, config.save_interval, length)
    limit = config.save_num_checkpoints_to_keep
    # The last checkpoint is saved at the end, too.
    kept = (saved or 1) if limit < 0 else min(limit, saved or limit)
    return Checkpoints(size, saved, kept, kept * size)


def run_cost(
    config: TrainConfig,
    plan: Plan,
    setting: Setting,
    rooflines: tuple[Hardware, Rates],
    length: Length,
    streams: Streams,
    options: Mapping[str, float | None],
) -> RunCost | None:
    """The time and cost of a run in a setting; None if its length or its step's time is unknown.

    `options` are `goodput` and `dollars_per_gpu_hour`.
    """
    if length.batches is None or setting.time is None:
        return None
    training = length.batches * setting.time.total
    evaluation = _evaluation_seconds(config, plan, setting, rooflines, length, streams)
    saved = checkpoints_of(config, plan, length)
    device = plan.device
    if config.save_async:
        pause = saved.bytes / setting.step.shards / HOST_COPY
    else:
        pause = saved.bytes / (STORE_OF_A_MACHINE * max(1, device.count // device.per_node))
    checkpointing = (saved.saved or 0) * pause
    goodput = options.get("goodput")
    if goodput is None:
        interval = training / max(1, saved.saved or 1)
        goodput = expected_goodput(device.count, interval)
    cost = RunCost(training, evaluation, checkpointing, goodput, device.count, None)
    price = options.get("dollars_per_gpu_hour")
    return cost if price is None else replace(cost, dollars=price * cost.device_hours)


def expected_goodput(devices: int, save_interval_seconds: float) -> float:
    """The share of the time that is not lost: each interruption costs a restart and half an interval."""
    per_day = devices / GPU_DAYS_PER_FAILURE
    lost = per_day * (RESTART_SECONDS + save_interval_seconds / 2) / DAY
    return 1 / (1 + lost)


def times_in_run(config: TrainConfig, interval: int | str, length: Length) -> int | None:
    """How often something happens that happens at an interval; None if it is unknown."""
    if length.batches is None:
        return None
    number, unit = parse_duration(interval)
    if number == 0:
        return 0
    whole = length.batches * config.global_train_batch_size * config.max_seq_len
    if unit == "ep":
        total, own = parse_duration(config.max_duration)
        return int(total // number) if own == "ep" else 1
    if unit == "dur":
        return round(1 / number)
    each = tokens_of(interval, config)
    return None if each is None else math.floor(whole / each)


def evaluated_rows(
    loader: LoaderConfig, label: str, config: TrainConfig, plan: Plan, streams: Streams
) -> int:
    """Rows of one evaluation; 0 if unknown."""
    known = streams
    sizes = [known.get((label, name)) for name in loader.dataset.sources]
    total = sum(each.samples or 0 for each in sizes if each is not None)
    if (limit := config.eval_subset_num_batches) > 0:
        rows = limit * plan.device_eval_batch_size * plan.device.count
        return min(rows, total) if total else rows
    return total


def _evaluation_seconds(
    config: TrainConfig,
    plan: Plan,
    setting: Setting,
    rooflines: tuple[Hardware, Rates],
    length: Length,
    streams: Streams,
) -> float:
    times = times_in_run(config, config.eval_interval, length) or 0
    rows = sum(
        evaluated_rows(loader, label, config, plan, streams) for label, loader in config.eval_loaders.items()
    )
    size = plan.device_eval_batch_size
    batches = math.ceil(rows / (size * plan.device.count))
    return (
        (times + config.eval_first)
        * batches
        * forward_seconds(replace(setting.step, microbatch=size), *rooflines)
    )
