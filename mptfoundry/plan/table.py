"""A plan as text, for `mptfoundry check` and the start of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mptfoundry.architecture.trainable import Trainable
from mptfoundry.config.data import LoaderConfig
from mptfoundry.config.engine.durations import UNITS, parse_duration
from mptfoundry.config.engine.forms import parse_count
from mptfoundry.config.engine.secrets import redacted
from mptfoundry.config.load import tasks_of
from mptfoundry.config.optim import OwnScheduleConfig
from mptfoundry.config.run import TrainConfig
from mptfoundry.places import is_url
from mptfoundry.plan.devices import GIB, Device, launcher_device
from mptfoundry.plan.plan import Plan, make_plan
from mptfoundry.tokenizer import Borders, adds_in_words, borders_of_folder

# Used only for the line on time, which names it as an assumption.
ASSUMED_MFU = 0.4


@dataclass(frozen=True)
class Stream:
    """What is known about a data stream before it is read.

    Attributes:
        place: Its location.
        samples: The number of its samples, if known.
    """

    place: str
    samples: int | None = None


# Keyed by loader (`train`, or an evaluation's label), then by stream.
Streams = Mapping[tuple[str, str], Stream]


def summary_table(config: TrainConfig, device: Device | None = None, streams: Streams | None = None) -> str:
    """The plan of a run as a short table.

    Args:
        config: The run.
        device: The run's devices. Default: those that the `composer` launcher would use here.
        streams: What is known about the data.

    Raises:
        ConfigError: The batch does not split over the devices, or options exclude each other there.
    """
    plan = make_plan(config, device or launcher_device())
    borders = borders_of_folder(config.tokenizer.name, config.tokenizer.kwargs)
    return describe_plan(config, plan, borders, streams)


def describe_plan(
    config: TrainConfig, plan: Plan, borders: Borders | None, streams: Streams | None = None
) -> str:
    """The plan of `config` as a short table, with what is known about the data.

    `borders` are the special tokens that the tokenizer adds to a text, as strings; None if that is unknown.
    """
    streams = streams or {}
    epochs = epochs_of_streams(config, streams) if streams else {}
    seconds, tokenizer = plan.seconds(ASSUMED_MFU), config.tokenizer.name
    rows = [
        ("model", _model_in_words(config, plan)),
        *([("trainable", _trainable_in_words(config, plan.trainable))] if plan.trainable.frozen else []),
        ("FLOPs", f"{plan.flops_per_token:.4g} per token, {plan.causal_flops_per_token:.4g} if causal"),
        ("batch", _batch_in_words(config, plan)),
        ("duration", _duration_in_words(config, plan, streams)),
        ("learning rate", _learning_rate_in_words(config)),
        *_data_in_words("train on", "train", config.train_loader, streams, epochs),
        *(
            row
            for label, loader in config.eval_loaders.items()
            for row in _data_in_words(f"eval {label}", label, loader, streams, {})
        ),
        *([("tasks", _tasks_in_words(config))] if config.icl_tasks is not None else []),
        *([("tokenizer", f"{tokenizer} {adds_in_words(borders)}")] if borders is not None else []),
        ("run folder", _run_folder_in_words(config)),
        ("device", f"{plan.device.count} x {plan.device.name} ({plan.device.found})"),
        *zip(("memory", ""), _memory_in_words(plan), strict=True),
        ("time", _time_in_words(plan, seconds) if seconds else "not known before it is measured"),
    ]
    width = max(len(name) for name, _ in rows) + 2
    lines = [config.run_name, *(f"  {name:{width}}{text}".rstrip() for name, text in rows)]
    width = max(map(len, plan.choices), default=0)
    auto = [f"    {key:{width}} = {each.value!s:18} {each.reason}" for key, each in plan.choices.items()]
    return "\n".join([*lines, "  auto, here", *auto])


def _model_in_words(config: TrainConfig, plan: Plan) -> str:
    model, attn = config.model, config.model.attn_config
    positions = "ALiBi" if attn.alibi else "rotary" if attn.rope else "learned"
    if not (attn.alibi or attn.rope or model.learned_pos_emb):
        positions = "no"
    heads = f"{model.n_heads} heads" + (f" ({model.kv_heads} for keys)" * (model.kv_heads < model.n_heads))
    biases = "no biases" if model.no_bias else "biases"
    return (
        f"{plan.parameters:,} parameters: {model.n_layers} layers, width {model.d_model}, {heads}, "
        f"{positions} positions, {biases}, vocabulary {model.vocab_size}"
    )


def _trainable_in_words(config: TrainConfig, trainable: Trainable) -> str:
    share = trainable.parameters / (trainable.parameters + trainable.frozen)
    text = f"{trainable.parameters:,} parameters, {share:.2%}"
    if (lora := config.model.peft_config) is not None:
        text += f": LoRA of rank {lora.r} on {', '.join(lora.targets(config.model))}"
    if config.optimizer.disable_grad:
        text += f"; frozen: {', '.join(config.optimizer.disable_grad)}"
    return text


def _batch_in_words(config: TrainConfig, plan: Plan) -> str:
    return (
        f"{config.global_train_batch_size} sequences of {config.max_seq_len}: {plan.tokens_per_batch:,} "
        f"tokens; {plan.device_train_batch_size} for each device, {plan.device_train_microbatch_size} at once"
    )


def _duration_in_words(config: TrainConfig, plan: Plan, streams: Streams) -> str:
    if plan.batches is None or plan.tokens is None or plan.flops is None:
        return _duration_of_unknown_length(config, plan, streams)
    return f"{plan.batches:,} batches, {plan.tokens:,} tokens, {plan.flops:.4g} FLOPs"


def _duration_of_unknown_length(config: TrainConfig, plan: Plan, streams: Streams) -> str:
    number, unit = parse_duration(config.max_duration)
    epoch = _samples_of_an_epoch(config, streams)
    if unit == "ep" and epoch is not None:
        batches = int(number) * int(epoch // config.global_train_batch_size)
        return f"{number:g} epochs, about {batches:,} batches, {batches * plan.tokens_per_batch:,} tokens"
    return f"{number:g} {UNITS[unit]}; how many batches depends on the size of the data"


def _learning_rate_in_words(config: TrainConfig) -> str:
    optimizer, schedule = config.optimizer, config.scheduler
    rate = getattr(optimizer, "lr", None)
    if isinstance(schedule, OwnScheduleConfig) or not isinstance(rate, (int, float)):
        return f"{optimizer.name}: {'its own' if rate is None else rate} along {schedule.name}"
    return f"{optimizer.name}: up to {rate:g} over {schedule.t_warmup}, {schedule.after_warmup(rate)}"


def epochs_of_streams(config: TrainConfig, streams: Streams) -> dict[str, float]:
    """How often the run reads each training stream on average, for streams of known size."""
    sources, batches = config.train_loader.dataset.sources, config.batches()
    weights: dict[str, float | None] = {name: stream.proportion for name, stream in sources.items()}
    if None in weights.values():
        weights = _drawn_in_an_epoch(config, streams)
    number, unit = parse_duration(config.max_duration)
    epoch, whole = _samples_of_an_epoch(config, streams), _sum(weights)
    run = batches * config.global_train_batch_size if batches is not None else None
    if batches is None and unit == "ep" and epoch is not None:
        run = int(number) * int(epoch)
    times = {}
    for name, weight in weights.items():
        samples = _samples_of(name, streams)
        if run and whole and samples and weight is not None:
            times[name] = run * weight / whole / samples
    return times


def _drawn_in_an_epoch(config: TrainConfig, streams: Streams) -> dict[str, float | None]:
    """Samples of each stream in an epoch without `epoch_size`; None if unknown."""
    drawn: dict[str, float | None] = {}
    for name, stream in config.train_loader.dataset.sources.items():
        samples = _samples_of(name, streams)
        repeated = None if samples is None else samples * (1 if stream.repeat is None else stream.repeat)
        drawn[name] = repeated if stream.choose is None else stream.choose
    return drawn


def _samples_of_an_epoch(config: TrainConfig, streams: Streams) -> float | None:
    if config.train_loader.dataset.epoch_size is not None:
        return parse_count(config.train_loader.dataset.epoch_size)
    return _sum(_drawn_in_an_epoch(config, streams))


def _samples_of(name: str, streams: Streams) -> int | None:
    stream = streams.get(("train", name))
    return None if stream is None else stream.samples


def _sum(numbers: Mapping[str, float | None]) -> float | None:
    """The sum, or None if a number is unknown."""
    known = [number for number in numbers.values() if number is not None]
    return sum(known) if len(known) == len(numbers) else None


def _data_in_words(
    name: str, loader_name: str, loader: LoaderConfig, streams: Streams, epochs: Mapping[str, float]
) -> list[tuple[str, str]]:
    """One row for each stream: its proportion, its name, its location, and its size if known."""
    sources = loader.dataset.sources
    total = sum(stream.proportion or 0 for stream in sources.values())
    width = max(map(len, sources))
    rows: list[tuple[str, str]] = []
    for stream_name, stream in sources.items():
        share = f"{stream.proportion / total:7.2%}" if stream.proportion is not None and total else "    all"
        if stream.repeat is not None:
            share = f"{stream.repeat:5g} x"
        if stream.choose is not None:
            share = f"{stream.choose:7,}"
        split = stream.split or loader.dataset.split
        place = place_of(stream.place, split)
        known = streams.get((loader_name, stream_name), Stream(place))
        text = f"{share}  {stream_name:{width}}  {known.place}"
        if known.samples is not None:
            text += f": {known.samples:,} samples"
        if stream_name in epochs:
            times = f"{epochs[stream_name]:.3g}"
            text += f", read {times} time{'s' * (times != '1')}"
        rows.append((name if not rows else "", text))
    return rows


def place_of(place: str | None, split: str | None) -> str:
    """A stream's location, as users read it."""
    return "/".join(filter(None, [redacted(place), split]))


def _tasks_in_words(config: TrainConfig) -> str:
    tasks, gauntlet = tasks_of(config)
    labels = ", ".join(f"{task.label} {list(task.shots)}" for task in tasks)
    averaged = ", averaged by eval_gauntlet" if gauntlet is not None else ""
    interval = config.eval_interval
    every = f"{interval} epochs" if isinstance(interval, int) else interval
    return f"every {every}, with these numbers of examples: {labels}{averaged}"


def _run_folder_in_words(config: TrainConfig) -> str:
    folder = (config.save_folder or "").replace("{run_name}", config.run_name)
    if is_url(folder):
        return f"runs/{config.run_name}, checkpoints in {folder}"
    return folder or f"runs/{config.run_name}; no checkpoints, since save_folder is not given"


def _memory_in_words(plan: Plan) -> tuple[str, str]:
    parts = {name: size for name, size in vars(plan.memory).items() if size >= GIB / 100}
    of = f" of {plan.device.memory / GIB:.1f}" if plan.device.memory else ""
    total = f"estimated {plan.memory.total / GIB:.1f}{of} GiB for each device, of these:"
    return total, ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())


def _time_in_words(plan: Plan, seconds: float) -> str:
    days = seconds / 86400
    span = f"{days:.1f} days" if days >= 2 else f"{seconds / 3600:.1f} hours"
    return (
        f"{span}, {days * 24 * plan.device.count:,.0f} device hours, if the MFU is {ASSUMED_MFU:.0%} "
        "(assumed, not measured)"
    )
