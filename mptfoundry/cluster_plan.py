"""`mptfoundry plan`: time, memory and cost of a run on clusters that are elsewhere, before they are rented.

It reads shard indexes where they can be read, builds no model and does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mptfoundry.check import look_here
from mptfoundry.config.run import TrainConfig
from mptfoundry.config.verbs import PlanConfig
from mptfoundry.errors import ConfigError
from mptfoundry.forecast import cluster_tables as tables
from mptfoundry.forecast.cluster_tables import Combination
from mptfoundry.forecast.constants import constants_for, refitted
from mptfoundry.forecast.hardware import hardware_of
from mptfoundry.forecast.run_cost import Length, checkpoints_of, run_cost, run_length
from mptfoundry.forecast.settings import best_setting, own_setting, settings_of, words_of
from mptfoundry.plan.devices import cluster_device
from mptfoundry.plan.plan import make_plan
from mptfoundry.plan.table import Streams


def plan_clusters(config: TrainConfig, options: PlanConfig, absent: Mapping[str, str] | None = None) -> str:
    """Return what `mptfoundry plan` prints; with `picture`, also draw it.

    Args:
        config: The run.
        options: The clusters, prices and what else the verb takes.
        absent: What was missing when the config was read, by key.

    Raises:
        ConfigError: No cluster can run the config, or a GPU is unknown.
    """
    look = look_here(config)
    streams = look.streams
    length = run_length(config, streams, options.examples, options.tokens_per_example)
    combinations, refused = [], []
    for gpu, price in zip(options.gpu, options.prices(), strict=True):
        for count in options.gpus:
            try:
                combinations.append(_combination(config, options, gpu, count, price, (length, streams)))
            except ConfigError as error:
                refused.append((f"{count} x {gpu}", error))
    if not combinations:
        raise refused[0][1]
    lines = _lines(config, options, combinations, length, streams)
    lines += [f"left out: {name}: {error}" for name, error in refused]
    lines += [f"here: {key}: {text.rstrip('.')}" for key, text in (absent or {}).items()]
    if options.picture is not None:
        from mptfoundry.forecast.picture import draw_forecast

        drawn = draw_forecast(config.run_name, combinations, options.picture)
        lines.append(f"picture: {options.picture}" if drawn else "picture: left out: no time is known")
    return "\n".join(lines)


def _combination(
    config: TrainConfig,
    options: PlanConfig,
    gpu: str,
    count: int,
    price: float | None,
    known: tuple[Length, Streams],
) -> Combination:
    device = cluster_device(gpu, count, options.gpus_per_node)
    plan = make_plan(config, device)
    constants, hardware = constants_for(device.name), hardware_of(device, options.network_gbps)
    if options.measured is not None and hardware is not None:
        constants = refitted(options.measured, device.name, constants)
    settings = list(settings_of(config, plan, hardware, constants.rates))
    own, best, cost = own_setting(config, plan, hardware, constants.rates), best_setting(settings), None
    if best is not None and hardware is not None:
        spending = {"goodput": options.goodput, "dollars_per_gpu_hour": price}
        plan = replace(plan, device_eval_batch_size=min(plan.device_eval_batch_size, best.microbatch))
        cost = run_cost(config, plan, best, (hardware, constants.rates), *known, spending)
    return Combination(gpu, plan, constants, own, best, settings, cost)


def _lines(
    config: TrainConfig,
    options: PlanConfig,
    combinations: list[Combination],
    length: Length,
    streams: Streams,
) -> list[str]:
    first_of_gpu = list({each.gpu: each for each in reversed(combinations)}.values())[::-1]
    lines = tables.model_lines(config, combinations[0].plan, length)
    lines += tables.data_lines(config, streams, length)
    for each in first_of_gpu:
        lines += ["", *tables.memory_lines(each)]
    lines.append("")
    for each in first_of_gpu:
        lines += tables.step_lines(each)
    lines += ["", *tables.run_lines(combinations)]
    if scaling := tables.scaling_lines(combinations):
        lines += ["", *scaling]
    lines.append("")
    for each in first_of_gpu:
        lines += tables.time_lines(each)
    saved = checkpoints_of(config, combinations[0].plan, length)
    lines += tables.checkpoint_lines(config, saved, options.dollars_per_gb_month)
    return lines + _proposal(config, combinations)


def _proposal(config: TrainConfig, combinations: list[Combination]) -> list[str]:
    """The cheapest combination, with the words that give the config its setting."""
    fitting = [each for each in combinations if each.best is not None]
    if not fitting:
        return ["nothing fits: take more GPUs, GPUs with more memory, or a shorter max_seq_len"]

    def price(each: Combination) -> tuple[float, float]:
        if each.cost is None:
            return 1.0, each.plan.device.count
        return 0.0, each.cost.device_hours if each.cost.dollars is None else each.cost.dollars

    cheapest = min(fitting, key=price)
    assert cheapest.best is not None
    words = words_of(cheapest.best, config)
    how = "by GPU-hours" if cheapest.cost is None or cheapest.cost.dollars is None else "by cost"
    return [f"cheapest {how}: {cheapest.name}: {' '.join(words) or 'as the config says'}"]
