"""A picture of a forecast: days and cost against the number of GPUs, for each kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mptfoundry.files import writing_into
from mptfoundry.forecast.cluster_tables import DAY, Combination


def draw_forecast(title: str, combinations: Sequence[Combination], path: str) -> bool:
    """Draw days, and cost or GPU-hours, over GPUs; returns whether there was anything to draw.

    Raises:
        ConfigError: The file can't be written.
    """
    known = [each for each in combinations if each.cost is not None]
    if not known:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    days, costs = figure.subplots(1, 2)
    has_price = all(each.cost is not None and each.cost.dollars is not None for each in known)
    for number, gpu in enumerate(dict.fromkeys(each.gpu for each in known)):
        of_gpu = [(each, each.cost) for each in known if each.gpu == gpu and each.cost is not None]
        counts = [each.plan.device.count for each, _ in of_gpu]
        spans = [cost.seconds / DAY for _, cost in of_gpu]
        band, color = of_gpu[0][0].constants.band, f"C{number}"
        days.plot(counts, spans, marker="o", color=color, label=gpu)
        low, high = ([span * (1 + sign * band) for span in spans] for sign in (-1, 1))
        days.fill_between(counts, low, high, color=color, alpha=0.15)
        costs.plot(
            counts,
            [cost.dollars if has_price else cost.device_hours for _, cost in of_gpu],
            marker="o",
            color=color,
            label=gpu,
        )
    for axes, name in ((days, "days"), (costs, "dollars" if has_price else "GPU-hours")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({each.plan.device.count for each in known}))
        axes.get_xaxis().set_major_formatter("{x:g}")
        axes.set_xlabel("GPUs")
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        axes.grid(True, color="0.9")
        axes.legend()
    figure.suptitle(title)
    target = Path(path)
    with writing_into(target.parent):
        figure.savefig(target, dpi=110)
    return True
