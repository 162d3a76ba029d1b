"""The text of a forecast: what `mptfoundry plan` prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mptfoundry.config.run import TrainConfig
from mptfoundry.forecast.constants import Constants
from mptfoundry.forecast.run_cost import Checkpoints, Length, RunCost
from mptfoundry.forecast.settings import POLICIES, Setting
from mptfoundry.plan.devices import GIB
from mptfoundry.plan.plan import USABLE, Plan
from mptfoundry.plan.table import Streams, epochs_of_streams

# From here on, repeated text helps less and less: Muennighoff et al., arXiv:2305.16264.
MOST_EPOCHS = 4
DAY = 86400.0
UNITS = {"days": DAY, "h": 3600.0, "min": 60.0, "s": 1.0}
# Layers that take less than this are bound by Python, which launches their kernels.
SHORTEST_LAYER_SECONDS = 0.002


@dataclass(frozen=True)
class Combination:
    """A run on a number of GPUs of a kind.

    Attributes:
        gpu: What the user calls the GPU.
        plan: The run's plan there.
        constants: Those of the GPU.
        own: The config's own setting.
        best: The fastest setting that fits; None if none does.
        settings: All settings.
        cost: Of the best setting; None if it can't be known.
    """

    gpu: str
    plan: Plan
    constants: Constants
    own: Setting
    best: Setting | None
    settings: Sequence[Setting]
    cost: RunCost | None

    @property
    def name(self) -> str:
        """Such as `64 x h100`."""
        return f"{self.plan.device.count} x {self.gpu}"

    def tokens_per_second(self, setting: Setting | None) -> float | None:
        """Of all devices in a setting; None if its time is unknown."""
        if setting is None or setting.time is None:
            return None
        return self.plan.tokens_per_batch / setting.time.total

    def mfu(self, setting: Setting) -> float | None:
        """The utilization in the convention of published MFU."""
        speed, peak = self.tokens_per_second(setting), self.plan.device.peak_flops
        if speed is None or peak is None:
            return None
        return speed * self.plan.flops_per_token / (peak * self.plan.device.count)

    def fastest(self, strategy: str) -> Setting | None:
        """The fastest setting of a sharding strategy that fits."""
        fitting = [s for s in self.settings if s.fits and s.time is not None and s.strategy == strategy]
        return min(fitting, key=lambda each: each.time.total if each.time else 0.0, default=None)


def model_lines(config: TrainConfig, plan: Plan, length: Length) -> list[str]:
    """Parameters, FLOPs and length of a run, which are the same on every cluster."""
    trainable = plan.trainable
    lines = [
        f"{config.run_name}: {plan.parameters:,} parameters"
        + (f", {trainable.parameters:,} of them or of adapters trainable" if trainable.frozen else ""),
        f"  FLOPs per token     {plan.flops_per_token:.4g}, {plan.causal_flops_per_token:.4g} if causal",
    ]
    if length.batches is None:
        return [*lines, f"  length              not known: {length.assumed}"]
    tokens = length.batches * plan.tokens_per_batch
    text = f"{length.batches:,} steps of {plan.tokens_per_batch:,} tokens: {tokens:.4g} tokens, "
    text += f"{tokens * plan.flops_per_token:.4g} FLOPs"
    return [
        *lines,
        f"  length              {text}" + (f" (assumed: {length.assumed})" if length.assumed else ""),
    ]


def data_lines(config: TrainConfig, streams: Streams, length: Length) -> list[str]:
    """Tokens and epochs of each stream, and what is unusual about them."""
    sources = config.train_loader.dataset.sources
    epochs = epochs_of_streams(config, streams)
    width = max(map(len, sources))
    lines, warnings, unknown = [], [], []
    for name in sources:
        known = streams.get(("train", name))
        if known is None or known.samples is None:
            unknown.append(name)
            continue
        text = f"  {name:{width}}  {known.samples * config.max_seq_len:>18,} tokens"
        if name in epochs:
            text += f", read {epochs[name]:.3g} times"
            if epochs[name] > MOST_EPOCHS:
                warnings.append(
                    f"  warning: {name} is repeated {epochs[name]:.3g} times; more than {MOST_EPOCHS} epochs "
                    "help less than new text (arXiv:2305.16264)"
                )
            elif epochs[name] < 1:
                warnings.append(f"  note: {name} is not exhausted: {epochs[name]:.1%} of it is read")
        lines.append(text)
    if unknown:
        lines.append(
            f"  the size of {_some(unknown)} is not known here: as much text as the run reads is assumed"
        )
    return ["data", *lines, *warnings]


def memory_lines(combination: Combination) -> list[str]:
    """Memory by part and activation policy, at the largest microbatch that fits under each."""
    own, device = combination.own, combination.plan.device
    of_strategy = [each for each in combination.settings if each.strategy == own.strategy]
    by_policy = {each.policy: each for each in of_strategy}
    shown = [by_policy[name] for name in POLICIES if name in by_policy]
    assert device.memory is not None
    reserve = (1 - USABLE[device.kind]) * device.memory
    parts = list(vars(own.memory))
    rows = [["GiB of a GPU, activations:", *(each.policy for each in shown)]]
    rows += [[part, *(f"{getattr(each.memory, part) / GIB:.2f}" for each in shown)] for part in parts]
    rows += [
        ["reserve for fragmentation", *(f"{reserve / GIB:.2f}" for _ in shown)],
        [f"total of {device.memory / GIB:.1f}", *(_total(each, reserve, device.memory) for each in shown)],
        ["largest microbatch", *(str(each.microbatch) if each.fits else "none fits" for each in shown)],
    ]
    return [f"memory of {combination.name}, sharding {own.strategy}", *_table(rows)]


def _span(seconds: float, band: float) -> str:
    """A time with its band, in the unit that suits it."""
    unit, size = next((unit, size) for unit, size in UNITS.items() if seconds >= 2 * size or size == 1)
    value = seconds / size
    return f"{value:.3g} {unit} ({value * (1 - band):.3g} to {value * (1 + band):.3g})"


def _few_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _total(setting: Setting, reserve: float, memory: int) -> str:
    return f"{(setting.memory.total + reserve) / GIB:.2f}"


def step_lines(combination: Combination) -> list[str]:
    """The parts of a step in the best setting, and what binds it."""
    setting = combination.best or combination.own
    time = setting.time
    if time is None:
        return [f"step of {combination.name}: no estimate: {_why_untimed(combination)}"]
    parts = ", ".join(
        f"{name} {seconds * 1000:,.0f}" for name, seconds in time.parts.items() if seconds >= 0.0005
    )
    total = f"total {time.total * 1000:,.0f}, mostly bound by {time.bound_by}"
    step = setting.step
    if time.total / step.microbatches < SHORTEST_LAYER_SECONDS * step.network.n_layers:
        total += "; so short that launching kernels takes longer, which is not estimated"
    return [
        f"step of {combination.name} in ms: {parts}; {total}",
        f"  constants: {combination.constants.source}; the estimate may be off by "
        f"{combination.constants.band:.0%}",
    ]


def run_lines(combinations: Iterable[Combination]) -> list[str]:
    """A line for each combination: its best setting, speed, time and cost."""
    rows = [
        [
            "GPUs",
            "sharding",
            "activations",
            "micro",
            "GiB",
            "tokens/s",
            "MFU",
            "time",
            "GPU-hours",
            "goodput",
            "cost",
        ]
    ]
    for each in combinations:
        setting = each.best
        if setting is None:
            rows.append([each.name, "nothing fits: see memory"])
            continue
        row = [each.name, setting.strategy, setting.policy, str(setting.microbatch)]
        row.append(f"{setting.memory.total / GIB:.1f}")
        speed, mfu, cost = each.tokens_per_second(setting), each.mfu(setting), each.cost
        row += [f"{speed:,.0f}", f"{mfu:.1%}"] if speed is not None and mfu is not None else ["-", "-"]
        if cost is None:
            row += ["-", "-", "-", "-"]
        else:
            row.append(_span(cost.seconds, each.constants.band))
            row += [_few_digits(cost.device_hours), f"{cost.goodput:.1%}"]
            row.append("-" if cost.dollars is None else f"${cost.dollars:,.0f}")
        rows.append(row)
    return ["the run, each in the fastest setting that fits", *_table(rows)]


def scaling_lines(combinations: Sequence[Combination]) -> list[str]:
    """Tokens per second with full and with hybrid sharding, and how each scales from the fewest GPUs."""
    rows = [["GPUs", "FULL_SHARD tokens/s", "scaling", "HYBRID_SHARD tokens/s", "scaling"]]
    first: dict[tuple[str, str], float] = {}
    for each in combinations:
        row = [each.name]
        for strategy in ("FULL_SHARD", "HYBRID_SHARD"):
            speed = each.tokens_per_second(each.fastest(strategy))
            if speed is None:
                row += ["-", "-"]
                continue
            per_gpu = speed / each.plan.device.count
            base = first.setdefault((each.gpu, strategy), per_gpu)
            row += [f"{speed:,.0f}", f"{per_gpu / base:.1%}"]
        rows.append(row)
    return ["scaling", *_table(rows)] if len(combinations) > 1 else []


def checkpoint_lines(
    config: TrainConfig, checkpoints: Checkpoints, dollars_per_gb_month: float | None
) -> list[str]:
    """The size of the checkpoints, and what those that stay cost in a month."""
    if config.save_folder is None:
        return [
            f"checkpoints: none are saved, since save_folder is not given; one has {_size(checkpoints.bytes)}"
        ]
    saved = "an unknown number" if checkpoints.saved is None else f"{checkpoints.saved:,}"
    text = (
        f"checkpoints: {_size(checkpoints.bytes)} each, {saved} saved, {checkpoints.kept:,} kept: "
        f"{_size(checkpoints.bytes_kept)}"
    )
    if dollars_per_gb_month is not None:
        text += f", ${checkpoints.bytes_kept / 1e9 * dollars_per_gb_month:,.2f} a month"
    return [text]


def time_lines(combination: Combination) -> list[str]:
    """How the time of the first combination's run is spent."""
    cost, setting = combination.cost, combination.best
    if cost is None or setting is None:
        return []
    lost = cost.seconds * (1 - cost.goodput)
    shares = {
        "training": cost.training,
        "evaluation": cost.evaluation,
        "waiting for checkpoints": cost.checkpointing,
        "interruptions": lost,
    }
    text = ", ".join(f"{name} {_few_digits(seconds / 3600)} h" for name, seconds in shares.items())
    speed = combination.tokens_per_second(setting)
    per_day = f"; {speed * DAY * cost.goodput:.3g} tokens a day" if speed else ""
    return [f"time of {combination.name}: {text}{per_day}"]


def _why_untimed(combination: Combination) -> str:
    if combination.plan.precision == "fp32":
        return "precision is fp32, and the model of a step is for 16 bits"
    return "nothing is published about this GPU's rates in bfloat16"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    width = [max(len(row[n]) for row in rows if n < len(row)) for n in range(max(map(len, rows)))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width[n]) if n == 0 else cell.rjust(width[n]) for n, cell in enumerate(row)
        ).rstrip()
        for row in rows
    ]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more streams" if len(names) > 3 else "")


def _size(number: int) -> str:
    return f"{number / 1e9:,.2f} GB"
